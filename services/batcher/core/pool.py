"""The workers that have one model: who of them can take a request, and who should.

What a request costs on a worker is `load.py`'s. A choice looks at the workers that hold some of the
prompt's prefix and at the `CANDIDATES_MAX` least loaded ones, so that it costs about the same with thirty
workers and with three hundred. A request may be told to wait for a busy worker, when that costs less
than any that is open: one that holds its prefix, or one where it harms fewer others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from services.batcher.core.load import UNLIMITED_TOKENS, Load
from services.batcher.core.messages import COMING, PREFIX_TOKENS, ModelReport, Request
from services.batcher.core.pace import Pace
from services.batcher.core.prefixes import Prefixes

if TYPE_CHECKING:
    from services.batcher.core.fleet import Worker

CANDIDATES_MAX = 8
"""Least loaded open workers that a choice looks at; a late request looks at all."""
MATCHES_MAX = 16
"""Workers with the longest matches that a choice looks at."""
PREFILL_TOKENS_PER_S_UNMEASURED = 2_000.0
"""Assumed until some worker has measured itself."""
SPEED_WEIGHT = 0.01
"""Share of the newest report in the mean speed of a pool's workers."""
WAIT_GAIN_S = 0.01
"""Waiting for a busy worker must promise at least this much."""

Key = tuple[float, int, int, Load]
"""(load in seconds, last use, worker's index, load): the index is unique, so `Load`s are never compared."""


class Choice(NamedTuple):
    """Where a request should go. `load` None: nowhere now."""

    load: Load | None
    matched: int = 0
    """Names of its prefix that this worker holds."""
    waits: bool = False
    """It is worth waiting for the worker; not to be sent there yet."""


NOWHERE = Choice(None)
FAR = float("inf")


class Pool:
    """Who has one model version."""

    __slots__ = (
        "_awaited",
        "_busy",
        "_by_bit",
        "_measured",
        "_open",
        "_starved_tokens",
        "hopeful",
        "hopeless_since",
        "largest_tokens",
        "loads",
        "model",
        "opened",
        "pace",
        "prefixes",
        "ready",
        "tokens_per_s",
        "unready_since",
    )

    def __init__(self, model: str, now: float) -> None:
        self.model = model
        self.loads: dict[str, Load] = {}
        """By endpoint."""
        self.prefixes = Prefixes()
        self.pace = Pace()
        self.hopeful = 0
        """Usable workers that serve the model or are loading it."""
        self.hopeless_since = now
        """Since when `hopeful` is 0, while it is."""
        self.ready = 0
        """Usable workers that serve the model."""
        self.unready_since = now
        """Since when `ready` is 0, while it is."""
        self.largest_tokens = 0
        """The longest prompt that any usable worker could ever hold; 0: no worker is ready."""
        self.tokens_per_s = PREFILL_TOKENS_PER_S_UNMEASURED
        """Mean prefill speed of its workers."""
        self.opened = False
        """Since the last plan, a worker became open, has room for what had none, or is gone."""
        self._measured = False
        self._open: list[Key] = []
        self._busy: list[Key] = []
        """Ready workers that are not open."""
        self._by_bit: dict[int, Load] = {}
        self._awaited: list[Load] = []
        self._starved_tokens = UNLIMITED_TOKENS
        """No open worker can hold a prompt of this length or more."""

    @property
    def open(self) -> int:
        """Workers that can take a request now."""
        return len(self._open)

    # Who is here.

    def join(self, worker: Worker, report: ModelReport) -> Load:
        """A worker has this model from now on."""
        load = self.loads[worker.endpoint] = Load(worker, self, report)
        self._by_bit[load.holder.bit] = load
        return load

    def leave(self, load: Load) -> None:
        """It does not any more."""
        del self.loads[load.worker.endpoint]
        del self._by_bit[load.holder.bit]
        self.prefixes.leave(load.holder)

    def offer(self, load: Load, key: Key, *, opened: bool) -> None:
        """A worker is ready, with this key; `opened`: it was not open before."""
        load.key = key
        insort(self._open if load.open else self._busy, key)
        if not load.open:
            return
        if opened:
            self.opened = True
        if self._starved_tokens < UNLIMITED_TOKENS and load.fits(self._starved_tokens):
            self._starved_tokens = UNLIMITED_TOKENS
            self.opened = True

    def discard(self, load: Load) -> None:
        """Take a worker out before its key changes."""
        assert load.key is not None, "only a ready worker has a key"
        keys = self._open if load.open else self._busy
        del keys[bisect_left(keys, load.key)]
        load.key = None

    # Where to.

    def choose(self, request: Request, *, patience_s: float, late: bool) -> Choice:
        """The cheapest worker that can start this now, or one that is worth waiting for, if the prompts
        ahead of it there take less than `patience_s`: one that holds some of its prefix, or any if it is
        `late`, which means that it missed its wish for a first token.
        """
        tokens = request.prompt_tokens
        if tokens >= self._starved_tokens:
            return NOWHERE
        best, cost_s = NOWHERE, FAR
        later, later_s = NOWHERE, FAR
        whole = self.pace.work(tokens, tokens)
        for load, matched in self._candidates(request, late=late):
            work = self.pace.work(max(tokens - matched * PREFIX_TOKENS, 1), tokens) if matched else whole
            own_s = load.late_cost_s(work) if late else load.cost_s(work)
            if load.open and load.fits(tokens):
                if own_s < cost_s:
                    best, cost_s = Choice(load, matched), own_s
            elif (late or matched) and own_s < later_s and load.wait_s() < patience_s:
                later, later_s = Choice(load, matched, waits=True), own_s
        if best.load is None and (best := self._any_open(tokens)).load is None:
            self._starved_tokens = tokens
            return NOWHERE
        if later.load is not None and later_s + WAIT_GAIN_S < cost_s:
            return self.await_(later, tokens)
        return best

    def _candidates(self, request: Request, *, late: bool) -> Iterator[tuple[Load, int]]:
        """(worker, names of the prefix that it holds) of those worth a look."""
        seen = 0
        looked_at = 0
        for bits, matched in reversed(self.prefixes.match(request.prefix)):
            while bits and looked_at < MATCHES_MAX:
                bit = bits & -bits
                bits ^= bit
                seen |= bit
                looked_at += 1
                load = self._by_bit[bit]
                if load.ready:
                    yield load, matched
        # A late one looks for the fewest to harm, another order than the keys', and may wait for them.
        for keys in (self._open, self._busy) if late else (self._open[:CANDIDATES_MAX],):
            for key in keys:
                if not key[3].holder.bit & seen:
                    yield key[3], 0

    def _any_open(self, tokens: int) -> Choice:
        """The least loaded worker that can start a prompt of this length now."""
        for key in self._open:
            if key[3].fits(tokens):
                return Choice(key[3])
        return NOWHERE

    def await_(self, choice: Choice, tokens: int) -> Choice:
        """A request waits for this worker: those that are looked at after it in this plan come behind it."""
        load = choice.load
        assert load is not None, "one waits for somebody"
        if not load.awaited_tokens:
            self._awaited.append(load)
        load.awaited_tokens += self.pace.work(max(tokens - choice.matched * PREFIX_TOKENS, 1), tokens)
        return choice

    def planned(self) -> None:
        """A plan is made: those who wait for a worker are counted anew in the next one."""
        for load in self._awaited:
            load.awaited_tokens = 0.0
        self._awaited.clear()
        self.opened = False

    # What is known of all.

    def coming(self) -> Load | None:
        """The load nearest to READY, while no worker is ready."""
        if self.largest_tokens:
            return None
        loads = [load for load in self.loads.values() if load.report.state in COMING]
        return max(loads, key=lambda load: load.report.progress, default=None)

    def prefill_s(self, request: Request) -> float:
        """Seconds that the prompt takes on a worker with nothing ahead and the longest match; 0 while
        nothing is known.
        """
        matches = self.prefixes.match(request.prefix)
        matched = matches[-1][1] if matches else 0
        rest = max(request.prompt_tokens - matched * PREFIX_TOKENS, 1)
        return self.pace.prefill_s(rest, request.prompt_tokens)

    def note_speed(self, tokens_per_s: float) -> None:
        """A worker measured its prefill."""
        if 0 < tokens_per_s < FAR:
            weight = SPEED_WEIGHT if self._measured else 1.0
            self.tokens_per_s += weight * (tokens_per_s - self.tokens_per_s)
            self._measured = True

    def count(self, load: Load, *, ready: bool, hopeful: bool, now: float) -> None:
        """Keep the numbers of workers that serve the model or will, and since when there are none."""
        if ready != load.ready:
            load.ready = ready
            self.ready += 1 if ready else -1
            # Who waits for a worker that is gone must look again.
            self.opened = self.opened or not ready
            if not self.ready:
                self.unready_since = now
        if hopeful != load.hopeful:
            load.hopeful = hopeful
            self.hopeful += 1 if hopeful else -1
            if not self.hopeful:
                self.hopeless_since = now

    def note_capacity(self, load: Load, tokens: int) -> None:
        """Keep `largest_tokens`. It walks the pool only when the largest worker shrinks or leaves."""
        before, load.capacity_tokens = load.capacity_tokens, tokens
        if tokens >= self.largest_tokens:
            self.largest_tokens = tokens
        elif before == self.largest_tokens:
            self.largest_tokens = max((each.capacity_tokens for each in self.loads.values()), default=0)
