"""Deadlines as absolute times, so that waiting in a queue uses them up."""

from __future__ import annotations

from typing import Protocol

from tokenloom.kit.clock import Clock


class HasDeadline(Protocol):
    """A call that may carry a deadline."""

    def deadline_s_left(self) -> float | None:
        """Seconds until the caller gives up, or None."""
        ...


def deadline_unix_ms(call: HasDeadline, clock: Clock, default_s: float) -> int:
    """When the caller gives up; `default_s` from now when it did not say."""
    left_s = call.deadline_s_left()
    return clock.unix_ms() + int(1000 * (default_s if left_s is None else min(left_s, default_s)))


def seconds_left(deadline_ms: int, clock: Clock) -> float:
    """Seconds until `deadline_ms`; negative when it passed."""
    return (deadline_ms - clock.unix_ms()) / 1000
