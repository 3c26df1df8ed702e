"""Weighted fair service between the tenants of one band, in order of deadline inside each.

Every tenant has a virtual counter, the tokens served to it over its weight, and the tenant with the
least is next: the Virtual Token Counter of Sheng et al. (arXiv 2401.00588). Computed prompt tokens cost
`PROMPT_COST` each and generated ones `OUTPUT_COST`. What workers report is charged when it is
reported, and what a request cost in all when it ends; from the moment it is placed until then, its
expected cost is charged ahead, so that a free fleet is not given away to one tenant between two reports.
A counter never falls, and that of a tenant who did not wait begins again at the least of those who do:
idleness earns no credit.

Bound: `flows_max` tenants; idle ones that are no longer ahead of the others are forgotten first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.batcher.core.entry import Entry

PROMPT_COST = 1.0
OUTPUT_COST = 2.0
"""The costs of the paper: a generated token takes a step of its own."""
OUTPUT_TOKENS_UNKNOWN = 128
"""Expected of a tenant that has ended no request yet."""
OUTPUT_WEIGHT = 0.1
"""Share of the newest request in the mean length of a tenant's outputs."""
TURNS = 1 << 60
"""More than there will ever be."""

Key = tuple[bool, int, int, int]
"""(late, deadline, first arrival, ticket), times in Unix milliseconds."""


class Flow:
    """One tenant's requests in one band of one model's queue."""

    __slots__ = (
        "_lead",
        "_offset",
        "_output_tokens",
        "_served",
        "entries",
        "keys",
        "leases",
        "parked",
        "prompt_tokens",
        "size_bytes",
        "tenant",
        "turn",
        "virtual",
        "waits",
        "weight",
    )

    def __init__(self, tenant: str, weight: float, clock: float, turn: int) -> None:
        self.tenant = tenant
        self.turn = turn
        """Its place among those of equal counters."""
        self.weight = weight
        self.virtual = clock
        """Tokens served over weight: the least is next."""
        self.keys: list[Key] = []
        self.entries: dict[int, Entry] = {}
        """Those who wait, by ticket."""
        self.prompt_tokens = 0
        self.size_bytes = 0
        self.leases = 0
        self.waits = False
        """It is in its band's heap."""
        self.parked = False
        """It is passed over as a whole, while a plan is made."""
        self._offset = clock
        self._served = 0.0
        self._lead = 0.0
        """Expected cost of what was placed and has not ended."""
        self._output_tokens: float | None = None

    @property
    def idle(self) -> bool:
        return not self.keys and not self.leases

    def expected_cost(self, uncached_tokens: int, output_tokens_max: int) -> float:
        """What a request is likely to cost in the end."""
        mean = OUTPUT_TOKENS_UNKNOWN if self._output_tokens is None else self._output_tokens
        return PROMPT_COST * uncached_tokens + OUTPUT_COST * min(mean, output_tokens_max)

    def lead(self, cost: float) -> None:
        """Charge this much ahead; negative: it ended, and what it really took is charged instead."""
        self._lead = max(self._lead + cost, 0.0)
        self._count()

    def serve(self, prompt_tokens: int, output_tokens: int) -> None:
        """So much was computed for it."""
        self._served += PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens
        self._count()

    def note_output(self, tokens: int) -> None:
        """One of its requests ended with an output of this length."""
        mean = self._output_tokens
        self._output_tokens = tokens if mean is None else mean + OUTPUT_WEIGHT * (tokens - mean)

    def lift(self, virtual: float) -> None:
        """It comes back from idleness: it stands no better than those who stayed."""
        if self.virtual < virtual:
            self._offset += virtual - self.virtual
            self.virtual = virtual

    def _count(self) -> None:
        virtual = self._offset + (self._served + self._lead) / self.weight
        self.virtual = max(self.virtual, virtual)


class Band:
    """One priority band of one model's queue."""

    __slots__ = ("_clock", "_flows_max", "_heap", "_turn", "depth", "flows", "prompt_tokens", "size_bytes")

    def __init__(self, flows_max: int) -> None:
        self.flows: dict[str, Flow] = {}
        self.depth = 0
        self.prompt_tokens = 0
        self.size_bytes = 0
        self._flows_max = flows_max
        self._clock = 0.0
        """The counter of whoever was chosen last: nobody who waits stands lower."""
        self._heap: list[tuple[float, int, Flow]] = []
        """Those who wait by counter and turn; a counter that grew since is put right when it comes up."""
        self._turn = 0

    def flow(self, tenant: str, weight: float) -> Flow:
        """The tenant's flow, which may be new."""
        flow = self.flows.get(tenant)
        if flow is None:
            if len(self.flows) >= self._flows_max:
                self._forget_idle()
            flow = self.flows[tenant] = Flow(tenant, weight, self._clock, self._turn_of_new())
        return flow

    def push(self, entry: Entry) -> None:
        """Let a request wait. A tenant that comes back from idleness stands no better than the others."""
        flow = entry.flow
        if not flow.keys:
            least = self._least()
            flow.lift(self._clock if least is None else least.virtual)
            flow.turn = self._turn_of_new()
        self.insert(entry)

    def insert(self, entry: Entry) -> None:
        """Put a request at its place in its flow."""
        flow = entry.flow
        if not flow.waits:
            self._queue(flow)
        insort(flow.keys, entry.key)
        flow.entries[entry.ticket] = entry
        self._count(entry, 1)

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out, wherever it stands. Raises KeyError when it is not here."""
        flow = entry.flow
        del flow.entries[entry.ticket]
        del flow.keys[bisect_left(flow.keys, entry.key)]
        self._count(entry, -1)

    def head(self) -> Entry | None:
        """Who is next."""
        flow = self._least()
        return flow.entries[flow.keys[0][3]] if flow is not None else None

    def chosen(self, flow: Flow) -> None:
        """The flow's head was placed: the band's clock goes on."""
        self._clock = max(self._clock, flow.virtual)
        # Of equal counters the one that was served longest ago is next.
        self._turn += 1
        flow.turn = self._turn
        if self._heap and self._heap[0][2] is flow:
            heapreplace(self._heap, (flow.virtual, flow.turn, flow))

    def unpark(self, flow: Flow) -> None:
        """The flow is at its place again."""
        flow.parked = False
        if flow.keys and not flow.waits:
            self._queue(flow)

    def ahead(self, entry: Entry) -> int:
        """About how many go first: exact inside the tenant's own, one turn each for the other tenants."""
        flow = entry.flow
        own = bisect_left(flow.keys, entry.key)
        others = self.depth - len(flow.keys)
        return own + min(others, own * (len(self._heap) - 1)) if others else own

    def newest(self) -> Entry | None:
        """Who came last, of the tenant with most requests waiting: the first to be shed."""
        flow = max(self.flows.values(), key=lambda flow: len(flow.keys), default=None)
        return flow.entries[max(flow.entries)] if flow is not None and flow.entries else None

    def let_go(self, flow: Flow) -> None:
        """Forget a flow that does nothing and would come back no better than a new one."""
        if flow.idle and flow.virtual <= self._clock and self.flows.get(flow.tenant) is flow:
            del self.flows[flow.tenant]

    def ahead_of_new(self, entry: Entry) -> int:
        """At least how many go before a request that is not here yet, if turns are equal."""
        flow = self.flows.get(entry.request.tenant)
        own = bisect_left(flow.keys, entry.key) if flow is not None else 0
        return min(self.depth, own * max(len(self._heap), 1))

    def _count(self, entry: Entry, sign: int) -> None:
        request, flow = entry.request, entry.flow
        self.depth += sign
        self.prompt_tokens += sign * request.prompt_tokens
        self.size_bytes += sign * request.size_bytes
        flow.prompt_tokens += sign * request.prompt_tokens
        flow.size_bytes += sign * request.size_bytes

    def _least(self) -> Flow | None:
        heap = self._heap
        while heap:
            virtual, _, flow = heap[0]
            if not flow.keys or flow.parked:
                heappop(heap)
                flow.waits = False
            elif flow.virtual > virtual:
                heapreplace(heap, (flow.virtual, flow.turn, flow))
            else:
                return flow
        return None

    def _queue(self, flow: Flow) -> None:
        flow.waits = True
        heappush(self._heap, (flow.virtual, flow.turn, flow))

    def _turn_of_new(self) -> int:
        """Who comes back from idleness, level with a tenant that floods, stands before it, and behind those
        who came back earlier.
        """
        self._turn += 1
        return self._turn - TURNS

    def _forget_idle(self) -> None:
        idle = [flow for flow in self.flows.values() if flow.idle]
        spent = [flow for flow in idle if flow.virtual <= self._clock]
        # Many at once, so that a stream of new tenants does not look through all of them each time.
        half = len(idle) // 2 + 1
        for flow in spent or sorted(idle, key=lambda flow: flow.virtual)[:half]:
            del self.flows[flow.tenant]
