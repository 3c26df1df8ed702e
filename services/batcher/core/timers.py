"""What is due when. A timer whose reason went away is not looked for: it is skipped when it comes up,
and thrown out when such timers outnumber the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")

SWEEP_MIN = 256
"""Fewer timers than this are never swept."""


class Timers(Generic[T]):
    """A heap of (time, thing). `pending(thing)` says whether a timer for it still matters."""

    __slots__ = ("_count", "_heap", "_pending", "_sweep_at")

    def __init__(self, pending: Callable[[T], bool]) -> None:
        self._pending = pending
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0
        self._sweep_at = SWEEP_MIN

    def __len__(self) -> int:
        return len(self._heap)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def at(self, when: float, thing: T) -> None:
        """Bring `thing` up at `when`."""
        self._count += 1
        heappush(self._heap, (when, self._count, thing))
        if len(self._heap) > self._sweep_at:
            self._heap = [item for item in self._heap if self._pending(item[2])]
            heapify(self._heap)
            self._sweep_at = max(SWEEP_MIN, 2 * len(self._heap))

    def due(self, now: float) -> Iterator[T]:
        """Take out what is due and still matters, earliest first."""
        while self._heap and self._heap[0][0] <= now:
            thing = heappop(self._heap)[2]
            if self._pending(thing):
                yield thing

    def next(self) -> float | None:
        """When to look again, at the earliest."""
        return self._heap[0][0] if self._heap else None
