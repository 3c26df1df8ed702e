"""Which workers hold which prefixes: an index from a prefix's name to the workers whose cache has it.

It is built from what was sent to a worker and put right by the worker's own reports. Names are chained
(a name stands for all tokens before it as well), so a prompt's longest match is found by following its
names until nobody holds the next one. Sets of workers are the bits of a number.

Bound: `prefixes_max` names for each worker; those noted longest ago are forgotten first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PREFIXES_MAX = 1 << 16
"""For one model on one worker: 32 million tokens of KV cache."""


class Holder:
    """What one worker holds of one model."""

    __slots__ = ("bit", "known", "tells")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.known: dict[int, bool] = {}
        """By name, whether the worker itself said so; the others are expected of what was sent there."""
        self.tells = False
        """It reports what it stores and evicts."""


class Prefixes:
    """All workers of one model."""

    def __init__(self, prefixes_max: int = PREFIXES_MAX) -> None:
        self._prefixes_max = prefixes_max
        self._holders: dict[int, int] = {}
        """By name, the bits of the workers that hold it."""
        self._free_bits: list[int] = []
        self._bits = 0

    def __len__(self) -> int:
        return len(self._holders)

    def __bool__(self) -> bool:
        return bool(self._holders)

    def join(self) -> Holder:
        """A worker that holds nothing yet."""
        if self._free_bits:
            return Holder(self._free_bits.pop())
        self._bits += 1
        return Holder(1 << (self._bits - 1))

    def leave(self, holder: Holder) -> None:
        """The worker is gone, and its bit may be another's."""
        self.clear(holder)
        self._free_bits.append(holder.bit)

    def clear(self, holder: Holder) -> None:
        """It holds nothing."""
        for name in holder.known:
            self._unmark(holder, name)
        holder.known.clear()

    def expect(self, holder: Holder, names: Iterable[int]) -> None:
        """A prompt with this prefix was sent there."""
        for name in names:
            if name not in holder.known:
                self._mark(holder, name, stored=False)

    def stored(self, holder: Holder, names: Iterable[int]) -> None:
        """The worker says that it holds these."""
        holder.tells = True
        for name in names:
            self._mark(holder, name, stored=True)

    def evicted(self, holder: Holder, names: Iterable[int]) -> None:
        """It does not hold these any more."""
        for name in names:
            if holder.known.pop(name, None) is not None:
                self._unmark(holder, name)

    def ended(self, holder: Holder, names: Sequence[int]) -> None:
        """A prompt that was sent there is over: what it was expected to leave is there, or never will be."""
        if holder.tells:
            self.evicted(holder, [name for name in names if holder.known.get(name) is False])

    def match(self, names: Sequence[int]) -> list[tuple[int, int]]:
        """(bits of workers, how many names they hold from the first one on), the longest match last."""
        found: list[tuple[int, int]] = []
        holders = self._holders
        held = -1
        for count, name in enumerate(names):
            both = held & holders.get(name, 0)
            if both != held and held != -1 and (gone := held & ~both):
                found.append((gone, count))
            held = both
            if not both:
                return found
        if names:
            found.append((held, len(names)))
        return found

    def _mark(self, holder: Holder, name: int, *, stored: bool) -> None:
        known = holder.known
        if name not in known:
            if len(known) >= self._prefixes_max:
                oldest = next(iter(known))
                del known[oldest]
                self._unmark(holder, oldest)
            self._holders[name] = self._holders.get(name, 0) | holder.bit
        known[name] = stored

    def _unmark(self, holder: Holder, name: int) -> None:
        left = self._holders[name] & ~holder.bit
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]
