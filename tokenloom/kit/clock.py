"""Time as an argument: the real clock, and one that tests move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component reads the time."""

    def monotonic(self) -> float:
        """Seconds that never go back; for durations."""
        ...

    def unix_ms(self) -> int:
        """Milliseconds since the epoch; for times that travel between machines."""
        ...

    def unix_ns(self) -> int:
        """Nanoseconds since the epoch; for spans."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def unix_ns(self) -> int:
        return time.time_ns()


class FakeClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, start_s: float = 1_000_000.0) -> None:
        self._now_s = start_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for a step back."""
        if seconds < 0:
            raise ValueError(f"time does not go back by {-seconds} s")
        self._now_s += seconds

    def monotonic(self) -> float:
        return self._now_s

    def unix_ms(self) -> int:
        return round(self._now_s * 1_000)

    def unix_ns(self) -> int:
        return round(self._now_s * 1_000_000_000)
