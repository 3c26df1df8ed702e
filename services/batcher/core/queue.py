"""The requests that wait for one model: strict priority bands, each fair between tenants.

It decides the order and nothing else; fairness inside a band is `flows.py`'s. A request that waited
long in a low band moves up one, and never into the first, which belongs to people who wait. No
operation walks the queue but those that say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from services.batcher.core.flows import Band, Flow
from services.batcher.core.messages import PRIORITY_LAST

if TYPE_CHECKING:
    from services.batcher.core.entry import Entry

BAND_FIRST_PROMOTED = 3
"""Requests of this band and those below may move up."""
PACE_WEIGHT = 0.1
"""Share of the newest gap in the mean gap between two dispatches."""
PACE_GAPS_MIN = 8
"""A pace of fewer gaps is not trusted."""


class Aging:
    """What the timer of promotions is set for; apart from the queue, which has a timer of its own."""

    __slots__ = ("queue", "timed", "watched")

    def __init__(self, queue: ModelQueue) -> None:
        self.queue = queue
        self.timed = False
        """A timer is set."""
        self.watched = False
        """The timer still matters."""


class ModelQueue:
    """Who waits for one model version, and the tenants' accounts while any of them waits or runs."""

    __slots__ = (
        "_aged",
        "_aside",
        "_gap_s",
        "_gaps",
        "_parked",
        "_placed_at",
        "_weights",
        "aging",
        "bands",
        "by_ticket",
        "leases",
        "model",
        "prompt_tokens",
        "size_bytes",
        "watched_until",
    )

    def __init__(self, model: str, weights: Mapping[str, float], flows_max: int) -> None:
        self.model = model
        self.by_ticket: dict[int, Entry] = {}
        """In the order of entering here, which is not the order of arrival."""
        self.prompt_tokens = 0
        self.size_bytes = 0
        self.leases = 0
        """Requests of this model that were placed and have not ended."""
        self.watched_until: float | None = None
        """When a timer looks after those who wait while no worker serves the model."""
        self.aging = Aging(self)
        self.bands = tuple(Band(flows_max) for _ in range(PRIORITY_LAST))
        self._weights = weights
        self._aged: tuple[dict[int, Entry], ...] = tuple({} for _ in range(PRIORITY_LAST))
        """By band, those who may move up, longest in the band first."""
        self._aside: list[Entry] = []
        self._parked: list[tuple[int, Flow]] = []
        self._gap_s = 0.0
        self._gaps = 0
        self._placed_at: float | None = None

    def __len__(self) -> int:
        return len(self.by_ticket)

    def __bool__(self) -> bool:
        # Compiled code takes every object without this for true, whatever its length.
        return bool(self.by_ticket)

    def push(self, entry: Entry) -> None:
        """Let a request wait."""
        entry.flow = self.flow(entry.band, entry.request.tenant)
        self._enter(entry)
        self.by_ticket[entry.ticket] = entry
        self.prompt_tokens += entry.request.prompt_tokens
        self.size_bytes += entry.request.size_bytes

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out, wherever it stands. Raises KeyError when it is not here."""
        del self.by_ticket[entry.ticket]
        self._leave(entry)
        self.prompt_tokens -= entry.request.prompt_tokens
        self.size_bytes -= entry.request.size_bytes

    def head(self) -> Entry | None:
        """Who is next."""
        for band in self.bands:
            if band.depth and (entry := band.head()) is not None:
                return entry
        return None

    def set_aside(self, entry: Entry) -> None:
        """Pass over the head until `restore`: the next one is looked at in its place."""
        self.bands[entry.band - 1].remove(entry)
        self._aside.append(entry)

    def turn_late(self, entry: Entry) -> None:
        """Its wish cannot be met any more: those of its tenant that still can go first."""
        band = self.bands[entry.band - 1]
        band.remove(entry)
        entry.key = (True, *entry.key[1:])
        band.insert(entry)

    def park(self, entry: Entry) -> None:
        """Pass over all that the head's tenant has in this band, until `restore`."""
        entry.flow.parked = True
        self._parked.append((entry.band, entry.flow))

    def restore(self) -> None:
        """Everyone who was passed over is back at their place."""
        for band, flow in self._parked:
            self.bands[band - 1].unpark(flow)
        self._parked.clear()
        for entry in self._aside:
            # Its account may have been let go meanwhile, since nothing of it seemed to be here.
            entry.flow = self.flow(entry.band, entry.request.tenant)
            self.bands[entry.band - 1].insert(entry)
        self._aside.clear()

    def flow(self, band: int, tenant: str) -> Flow:
        """The account that a tenant's requests of a band belong to."""
        return self.bands[band - 1].flow(tenant, self._weights.get(tenant, 1.0))

    def charge(self, band: int, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """A worker computed so much for a tenant, whichever replica sent it there."""
        self.flow(band, tenant).serve(prompt_tokens, output_tokens)

    def position(self, entry: Entry) -> int:
        """About how many are ahead of a request that waits here; exact for a tenant that is alone."""
        ahead = sum(band.depth for band in self.bands[: entry.band - 1])
        return ahead + self.bands[entry.band - 1].ahead(entry)

    def ahead_of_new(self, entry: Entry) -> int:
        """At least how many would go before a request that is not here yet."""
        above = sum(each.depth for each in self.bands[: entry.band - 1])
        return above + self.bands[entry.band - 1].ahead_of_new(entry)

    def oldest(self) -> Entry | None:
        """Who has been here longest."""
        return next(iter(self.by_ticket.values()), None)

    def held_for(self, hold_s: float, now: float) -> list[Entry]:
        """Those who have been here for `hold_s` or longer, longest first."""
        found: list[Entry] = []
        for entry in self.by_ticket.values():
            if entry.entered + hold_s > now:
                break
            found.append(entry)
        return found

    def least_urgent(self, below: int) -> Entry | None:
        """The first to be shed among those in bands under `below`."""
        for number in range(PRIORITY_LAST, below, -1):
            if self.bands[number - 1].depth:
                return self.bands[number - 1].newest()
        return None

    def depth_by_band(self) -> dict[int, int]:
        """Requests waiting in each band that has any."""
        return {number: band.depth for number, band in enumerate(self.bands, 1) if band.depth}

    def waiting_flows(self) -> Iterator[tuple[int, Flow]]:
        """(band, flow) of every tenant that waits. Walks all flows."""
        for number, band in enumerate(self.bands, 1):
            yield from ((number, flow) for flow in band.flows.values() if flow.keys)

    # Time.

    def promote(self, age_s: float, now: float) -> int:
        """Move up everybody who waited so long in a band; how many moved."""
        moved = 0
        for number in range(BAND_FIRST_PROMOTED, PRIORITY_LAST + 1):
            aged = self._aged[number - 1]
            while aged and (entry := next(iter(aged.values()))).band_since + age_s <= now:
                self._leave(entry)
                entry.band, entry.band_since = number - 1, now
                self._let_go(number, entry.flow)
                entry.flow = self.flow(entry.band, entry.request.tenant)
                self._enter(entry)
                moved += 1
        return moved

    def stop_aging(self) -> None:
        """Nobody waits: the timer that is set does not matter any more, and the next one is another's."""
        if self.aging.timed:
            self.aging.watched = False
            self.aging = Aging(self)

    def promotion_due(self, age_s: float) -> float | None:
        """When the next request may move up."""
        firsts = [next(iter(aged.values())).band_since for aged in self._aged if aged]
        return min(firsts) + age_s if firsts else None

    def note_placed(self, now: float) -> None:
        """A request left for a worker: remember the pace, unless nobody else waits for one."""
        if self._placed_at is not None:
            self._gap_s += max(PACE_WEIGHT, 1 / (self._gaps + 1)) * (now - self._placed_at - self._gap_s)
            self._gaps += 1
        self._placed_at = now if self.by_ticket else None

    @property
    def gap_s(self) -> float:
        """Mean seconds between two dispatches while somebody waited; 0 while it is unknown."""
        return self._gap_s if self._gaps >= PACE_GAPS_MIN else 0.0

    def drain_estimate_s(self) -> float:
        """Seconds until those now waiting are placed, at the present pace; 0 while it is unknown."""
        return self.gap_s * len(self.by_ticket)

    # Accounts.

    def placed(self, entry: Entry, cost: float) -> None:
        """The request that was removed last goes to a worker: its tenant pays ahead."""
        entry.cost = cost
        entry.flow.leases += 1
        self.leases += 1
        self.bands[entry.band - 1].chosen(entry.flow)
        entry.flow.lead(cost)

    def ended(self, entry: Entry) -> None:
        """A placed request is over."""
        entry.flow.leases -= 1
        entry.flow.lead(-entry.cost)
        self.leases -= 1
        self._let_go(entry.band, entry.flow)

    def let_go(self, entry: Entry) -> None:
        """A request left without being placed."""
        self._let_go(entry.band, entry.flow)

    # Inside.

    def _let_go(self, band: int, flow: Flow) -> None:
        self.bands[band - 1].let_go(flow)

    def _enter(self, entry: Entry) -> None:
        self.bands[entry.band - 1].push(entry)
        if entry.band >= BAND_FIRST_PROMOTED:
            self._aged[entry.band - 1][entry.ticket] = entry

    def _leave(self, entry: Entry) -> None:
        self.bands[entry.band - 1].remove(entry)
        if entry.band >= BAND_FIRST_PROMOTED:
            self._aged[entry.band - 1].pop(entry.ticket, None)
