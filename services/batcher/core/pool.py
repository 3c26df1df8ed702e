"""The workers that have one model, the candidates among them in order of load.

The measure of load is the delay in seconds that a new sequence would meet there: prompt tokens ahead
of it over the worker's prefill speed, and a term that grows without bound as sequences or blocks run
out (the "least load" measure of SMG, the SGLang model gateway). Equal loads go to the worker used
longest ago.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from services.batcher.core.messages import COMING, ModelReport, ModelState

if TYPE_CHECKING:
    from services.batcher.core.fleet import Worker

CROWDING_S = 0.15
"""Delay that half-full stands for."""
CROWDING_SHARE_MAX = 0.99
PREFILL_TOKENS_PER_S_UNMEASURED = 2_000.0
"""Assumed until a worker has measured itself."""
UNLIMITED_TOKENS = 1 << 62

Key = tuple[float, int, int, "Load"]
"""(load in seconds, last use, worker's index, load): the index is unique, so `Load`s are never compared."""


class Load:
    """One model on one worker: its latest report less the leases not listed there yet."""

    __slots__ = (
        "capacity_tokens",
        "hopeful",
        "key",
        "pending",
        "pending_blocks",
        "pending_tokens",
        "pool",
        "report",
        "worker",
    )

    def __init__(self, worker: Worker, pool: Pool, report: ModelReport) -> None:
        self.worker = worker
        self.pool = pool
        self.report = report
        self.pending = 0
        self.pending_blocks = 0
        self.pending_tokens = 0
        self.key: Key | None = None
        """Its place among the pool's candidates, if it is one."""
        self.hopeful = False
        self.capacity_tokens = 0

    @property
    def free_sequences(self) -> int:
        return self.report.free_sequences - self.pending

    @property
    def free_blocks(self) -> int:
        return self.report.free_blocks - self.pending_blocks

    def blocks_for(self, prompt_tokens: int) -> int:
        """Blocks that a prompt needs, with one for the first output."""
        block_tokens = self.report.block_tokens
        return -(-prompt_tokens // block_tokens) + 1 if block_tokens else 0

    def fits(self, prompt_tokens: int) -> bool:
        """Could it start now?"""
        return (
            self.report.free_sequences > self.pending
            and self.report.free_blocks - self.pending_blocks >= self.blocks_for(prompt_tokens)
        )

    def deduct(self, prompt_tokens: int, sign: int) -> None:
        """Count (+1) or give back (-1) one lease that no report lists yet."""
        self.pending += sign
        self.pending_blocks += sign * self.blocks_for(prompt_tokens)
        self.pending_tokens += sign * prompt_tokens

    def clear_deductions(self) -> None:
        self.pending = self.pending_blocks = self.pending_tokens = 0

    def delay_s(self) -> float:
        """The measure of load; see the module's head."""
        report = self.report
        share = 1 - self.free_sequences / max(report.sequences_max, report.free_sequences, 1)
        if report.total_blocks:
            share = max(share, 1 - self.free_blocks / report.total_blocks)
        share = min(max(share, 0.0), CROWDING_SHARE_MAX)
        backlog = report.queued_prefill_tokens + self.pending_tokens
        measured = report.prefill_tokens_per_s
        speed = measured if measured > 0 else PREFILL_TOKENS_PER_S_UNMEASURED
        return backlog / speed + CROWDING_S * share / (1 - share)

    def refresh(self, now: float) -> None:
        """Something about it changed: take the right place in its pool, or leave."""
        worker, report, pool = self.worker, self.report, self.pool
        usable = worker.usable
        ready = usable and report.state is ModelState.READY
        if self.key is not None:
            pool.discard(self.key)
            self.key = None
        if ready and report.free_sequences > self.pending:
            self.key = (self.delay_s(), worker.last_used, worker.index, self)
            pool.offer(self.key)
        pool.count_hope(self, ready or (usable and report.state in COMING), now)
        pool.note_capacity(self, self._capacity_tokens() if ready else 0)

    def drop(self, now: float) -> None:
        """The worker does not have this model any more."""
        pool = self.pool
        if self.key is not None:
            pool.discard(self.key)
            self.key = None
        del pool.loads[self.worker.endpoint]
        pool.count_hope(self, False, now)
        pool.note_capacity(self, 0)

    def _capacity_tokens(self) -> int:
        report = self.report
        if not report.block_tokens:
            return UNLIMITED_TOKENS
        return max(report.total_blocks - 1, 0) * report.block_tokens


class Pool:
    """Who has one model version."""

    __slots__ = (
        "_candidates",
        "_starved_tokens",
        "hopeful",
        "hopeless_since",
        "largest_tokens",
        "loads",
        "model",
    )

    def __init__(self, model: str, now: float) -> None:
        self.model = model
        self.loads: dict[str, Load] = {}
        """By endpoint."""
        self.hopeful = 0
        """Usable workers that serve the model or are loading it."""
        self.hopeless_since = now
        """Since when `hopeful` is 0, while it is."""
        self.largest_tokens = 0
        """The longest prompt that any usable worker could ever hold; 0: no worker is ready."""
        self._candidates: list[Key] = []
        self._starved_tokens = UNLIMITED_TOKENS
        """No candidate can hold a prompt of this length or more."""

    def choose(self, prompt_tokens: int) -> Load | None:
        """The least loaded worker that can start a prompt of this length now."""
        if prompt_tokens >= self._starved_tokens:
            return None
        for key in self._candidates:
            if key[3].fits(prompt_tokens):
                return key[3]
        self._starved_tokens = prompt_tokens
        return None

    def coming(self) -> Load | None:
        """The load nearest to READY, while no worker is ready."""
        if self.largest_tokens:
            return None
        loads = [load for load in self.loads.values() if load.report.state in COMING]
        return max(loads, key=lambda load: load.report.progress, default=None)

    def offer(self, key: Key) -> None:
        """A worker can take at least one sequence."""
        insort(self._candidates, key)
        if key[3].fits(self._starved_tokens):
            self._starved_tokens = UNLIMITED_TOKENS

    def discard(self, key: Key) -> None:
        del self._candidates[bisect_left(self._candidates, key)]

    def count_hope(self, load: Load, hopeful: bool, now: float) -> None:
        """Keep `hopeful` and `hopeless_since`."""
        if hopeful == load.hopeful:
            return
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
