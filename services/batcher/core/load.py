"""One model on one worker, and what it costs to send a request there, in seconds.

The cost of a request is the delay that it meets and the delay that it causes:

- prompt work ahead of it, over the worker's prefill speed;
- its own uncached prompt work, once for itself and once for each sequence that decodes there, for a
  step with a prompt in it is a long one for all of them;
- slower decoding: `NEIGHBOUR` of a mean decode time for each sequence that runs there, and `PROMPTS` of
  it for the share of time that prompts took there lately, since more of them will come;
- crowding, which grows without bound as sequences or blocks run out (the "least load" measure of SMG,
  the SGLang model gateway, whose first term is ours as well).

A request that missed its wish for a first token cares for the first two only, and weighs the delay that
it causes to those that can still be met `LATE_HARM` times. So long prompts gather on few workers and
leave the others to those who are waited for.

A worker is open while it has a free sequence and less prompt work ahead than its next step can hold: what
is sent then fills that step, and what is not sent can still be ordered.
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from services.batcher.core.messages import COMING, ModelReport, ModelState, PrefixChanges

if TYPE_CHECKING:
    from services.batcher.core.fleet import Worker
    from services.batcher.core.pool import Key, Pool

CROWDING_S = 0.15
"""Delay that half-full stands for."""
CROWDING_SHARE_MAX = 0.99
NEIGHBOUR = 0.04
PROMPTS = 2.0
PROMPTS_MEMORY = 7.0
"""Mean decode times over which the share of prompts is remembered."""
LATE_HARM = 5.0
DRIFT_S = 0.2
"""Changes that only drift are looked at so often."""
AHEAD_S = 0.05
"""Prompt work that a worker may have ahead, at least: a report and a pick take part of this time."""
UNLIMITED_TOKENS = 1 << 62


class Load:
    """One model on one worker: its latest report less the leases not listed there yet."""

    __slots__ = (
        "_harm",
        "_prompts_at",
        "_prompts_s",
        "_refreshed_at",
        "_speed",
        "awaited_tokens",
        "capacity_tokens",
        "holder",
        "hopeful",
        "key",
        "late",
        "open",
        "pending",
        "pending_blocks",
        "pending_tokens",
        "pool",
        "ready",
        "report",
        "worker",
    )

    def __init__(self, worker: Worker, pool: Pool, report: ModelReport) -> None:
        self.worker = worker
        self.pool = pool
        self.report = report
        self.holder = pool.prefixes.join()
        self.pending = 0
        self.pending_blocks = 0
        self.pending_tokens = 0
        self.awaited_tokens = 0.0
        """Work of those who wait for this worker, while a plan is made."""
        self.late = 0
        """Leases of requests that missed their wish."""
        self.key: Key | None = None
        """Its place among the pool's ready workers, if it is one."""
        self.open = False
        """It can take a request now."""
        self.hopeful = False
        self.ready = False
        """It serves the model, though it may be busy or full."""
        self.capacity_tokens = 0
        self._prompts_s = 0.0
        self._prompts_at = 0.0
        self._refreshed_at = 0.0
        # Of the latest `refresh`, for `cost_s`, which is asked far more often than they change.
        self._speed = self.tokens_per_s
        self._harm = 1

    @property
    def free_sequences(self) -> int:
        return self.report.free_sequences - self.pending

    @property
    def free_blocks(self) -> int:
        return self.report.free_blocks - self.pending_blocks

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens that are computed there before those of a new request."""
        return self.report.queued_prefill_tokens + self.pending_tokens

    @property
    def tokens_per_s(self) -> float:
        """Its prefill speed; as long as it measured none, that of the others."""
        measured = self.report.prefill_tokens_per_s
        return measured if measured > 0 else self.pool.tokens_per_s

    @property
    def running(self) -> int:
        """Sequences there, those on their way too."""
        return self.report.running + self.report.waiting + self.pending

    def blocks_for(self, prompt_tokens: int) -> int:
        """Blocks that a prompt needs, with one for the first output."""
        block_tokens = self.report.block_tokens
        return -(-prompt_tokens // block_tokens) + 1 if block_tokens else 0

    def fits(self, prompt_tokens: int) -> bool:
        """Are there a sequence and blocks for it now?"""
        return (
            self.report.free_sequences > self.pending
            and self.report.free_blocks - self.pending_blocks >= self.blocks_for(prompt_tokens)
        )

    # Costs.

    def delay_s(self) -> float:
        """The part of the cost that is the same for every request."""
        report, decode_s = self.report, self.pool.pace.decode_s
        share = 1 - self.free_sequences / max(report.sequences_max, report.free_sequences, 1)
        if report.total_blocks:
            share = max(share, 1 - self.free_blocks / report.total_blocks)
        share = min(max(share, 0.0), CROWDING_SHARE_MAX)
        slower_s = NEIGHBOUR * decode_s * self.running + PROMPTS / PROMPTS_MEMORY * self._prompts_s
        return self.wait_s() + CROWDING_S * share / (1 - share) + slower_s

    def wait_s(self) -> float:
        """Until the prompts ahead are computed."""
        return self.backlog_tokens / self.tokens_per_s

    def cost_s(self, work: float) -> float:
        """Of a request with so much uncached work that is sent there, or waits to be."""
        assert self.key is not None, "only a ready worker has a cost"
        return self.key[0] + (self.awaited_tokens + work * self._harm) / self._speed

    def late_cost_s(self, work: float) -> float:
        """Of one that missed its wish."""
        harmed = max(self.running - self.late, 0)
        ahead = self.backlog_tokens + self.awaited_tokens
        return (ahead + work * (1 + LATE_HARM * harmed)) / self.tokens_per_s

    # What happens.

    def deduct(self, prompt_tokens: int, uncached_tokens: int, sign: int) -> None:
        """Count (+1) or give back (-1) one lease that no report lists yet."""
        self.pending += sign
        self.pending_blocks += sign * self.blocks_for(prompt_tokens)
        self.pending_tokens += sign * uncached_tokens

    def clear_deductions(self) -> None:
        self.pending = self.pending_blocks = self.pending_tokens = 0

    def note_prompt(self, work: float, now: float) -> None:
        """A prompt of so much work is sent there; it counts less as time passes."""
        if now > self._prompts_at:
            if self._prompts_s:
                memory_s = PROMPTS_MEMORY * self.pool.pace.decode_s
                self._prompts_s *= exp((self._prompts_at - now) / memory_s)
            self._prompts_at = now
        self._prompts_s += work / self.tokens_per_s

    def stays(self, report: ModelReport, now: float) -> bool:
        """Take a report in if it moves nothing: blocks that fill and speeds that drift wait for `DRIFT_S`."""
        last = self.report
        if report == last:
            return True
        if (
            now >= self._refreshed_at + DRIFT_S
            or report.state is not last.state
            or report.free_sequences != last.free_sequences
            or report.queued_prefill_tokens != last.queued_prefill_tokens
            or report.running + report.waiting != last.running + last.waiting
            or report.free_blocks > last.free_blocks
            or report.total_blocks != last.total_blocks
            or report.sequences_max != last.sequences_max
            or report.block_tokens != last.block_tokens
            or report.step_tokens_max != last.step_tokens_max
        ):
            return False
        self.report = report
        return True

    def refresh(self, now: float) -> None:
        """Something about it changed: take the right place in its pool, or leave."""
        worker, report, pool = self.worker, self.report, self.pool
        self._refreshed_at = now
        usable = worker.usable
        ready = usable and report.state is ModelState.READY
        was_open = self.open
        if self.key is not None:
            pool.discard(self)
        self.open = ready and report.free_sequences > self.pending and self._has_step_room()
        if ready:
            self.note_prompt(0, now)
            pool.note_speed(report.prefill_tokens_per_s)
            self._speed, self._harm = self.tokens_per_s, 1 + self.running
            pool.offer(self, (self.delay_s(), worker.last_used, worker.index, self), opened=not was_open)
        pool.count(self, ready=ready, hopeful=ready or (usable and report.state in COMING), now=now)
        pool.note_capacity(self, self._capacity_tokens() if ready else 0)

    def learn(self, changes: PrefixChanges) -> None:
        """The worker says what its cache holds."""
        prefixes = self.pool.prefixes
        if changes.whole:
            prefixes.clear(self.holder)
        prefixes.evicted(self.holder, changes.evicted)
        prefixes.stored(self.holder, changes.stored)

    def drop(self, now: float) -> None:
        """The worker does not have this model any more."""
        pool = self.pool
        if self.key is not None:
            pool.discard(self)
        self.open = False
        pool.leave(self)
        pool.count(self, ready=False, hopeful=False, now=now)
        pool.note_capacity(self, 0)

    def _has_step_room(self) -> bool:
        step_tokens = self.report.step_tokens_max
        backlog = self.backlog_tokens
        return not (step_tokens and backlog) or backlog < max(step_tokens, AHEAD_S * self.tokens_per_s)

    def _capacity_tokens(self) -> int:
        report = self.report
        if not report.block_tokens:
            return UNLIMITED_TOKENS
        return max(report.total_blocks - 1, 0) * report.block_tokens
