"""Which bytes of a file are here: disjoint ranges, half open. Pure, without I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

Span = tuple[int, int]


class Ranges:
    """Kept sorted; ranges that touch are one."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for start, end in spans:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """`start <= byte < end` is here. An empty range adds nothing."""
        if start >= end:
            return
        first = bisect_left(self._spans, start, key=lambda span: span[1])
        last = first
        while last < len(self._spans) and self._spans[last][0] <= end:
            start, end = min(start, self._spans[last][0]), max(end, self._spans[last][1])
            last += 1
        self._spans[first:last] = [(start, end)]

    @property
    def front(self) -> int:
        """Every byte before this one is here."""
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    @property
    def total(self) -> int:
        """How many bytes are here."""
        return sum(end - start for start, end in self._spans)

    def gaps(self, size: int, span_max: int) -> Iterator[Span]:
        """What is missing of the first `size` bytes, from the front on, in pieces of at most `span_max`."""
        at = 0
        for start, end in [*self._spans, (size, size)]:
            stop = min(start, size)
            while at < stop:
                yield at, min(at + span_max, stop)
                at = min(at + span_max, stop)
            at = max(at, end)

    def __iter__(self) -> Iterator[Span]:
        return iter(list(self._spans))
