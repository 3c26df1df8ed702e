"""Whether a failed attempt is made again, and when.

Refused before a worker began (full, draining, unreachable): again until the deadline, for nothing
was spent. A policy's answer (queue full, shed, no capacity, no memory for the model) goes to the caller
with its hint, unless a worker had begun already: then the mesh owes the rest. Breaks without any
progress are few, so that a request that kills engines does not kill many.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ldexp

from services.gateway.core.journal import Journal

BACKOFF_DOUBLINGS_MAX = 16
"""Keeps the exponent of a long row of failures small."""

RESENT_REASONS = frozenset({"WORKER_FULL", "ENGINE_RESTARTED", "SERVICE_UNAVAILABLE", "DRAINING"})
NOT_READY_ATTEMPTS_MAX = 16
"""Attempts in a row that find no worker with the model: without the batcher, chance picks workers. A
MODEL_NOT_READY with a hint when to try again is no worker's: then the batcher has waited already."""
BREAK_REASONS = frozenset({"ENGINE_RESTARTED"})
"""Reasons that mean a worker had begun, even when it had sent nothing yet."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended."""

    reason: str
    retriable: bool
    retry_after_s: float | None = None
    began: bool = False
    """Something of this attempt had arrived."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds on re-sending one output."""

    attempts_max: int
    breaks_max: int
    """Breaks in a row without a new token."""
    backoff_initial_s: float
    backoff_max_s: float

    def delay_s(
        self, failure: Failure, journal: Journal, *, seconds_left: float, jitter: float
    ) -> float | None:
        """Seconds to wait before the next attempt; None when there is to be none.

        `jitter` in [0, 1) spreads callers that failed together. Call `journal.begun_and_broken` first
        where `is_break` says so.
        """
        if not failure.retriable or journal.attempts >= self.attempts_max:
            return None
        if journal.breaks > self.breaks_max:
            return None
        if not journal.broken and not self._resent(failure, journal.fruitless):
            return None
        delay = self._backoff_s(max(1, journal.fruitless), jitter)
        if failure.retry_after_s is not None:
            delay = max(delay, failure.retry_after_s * (1 + jitter / 4))
        return delay if delay < seconds_left else None

    def _resent(self, failure: Failure, fruitless: int) -> bool:
        if failure.reason == "MODEL_NOT_READY":
            return failure.retry_after_s is None and fruitless < NOT_READY_ATTEMPTS_MAX
        return failure.reason in RESENT_REASONS

    def _backoff_s(self, failures: int, jitter: float) -> float:
        doubled = ldexp(self.backoff_initial_s, min(failures - 1, BACKOFF_DOUBLINGS_MAX))
        return min(self.backoff_max_s, doubled) * (0.5 + jitter / 2)


def is_break(failure: Failure) -> bool:
    """True when a worker had begun: its memory was spent, and a resume is owed."""
    return failure.began or failure.reason in BREAK_REASONS
