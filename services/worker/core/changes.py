"""What a set gained and lost since somebody last asked, without what came and went in between.

Bound: as many entries as the set has now and had then.
"""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")


class NetChanges(Generic[K]):
    """Told of every key that enters or leaves a set."""

    __slots__ = ("_net",)

    def __init__(self) -> None:
        self._net: dict[K, bool] = {}
        """True: gained, False: lost."""

    def __bool__(self) -> bool:
        return bool(self._net)

    def gain(self, key: K) -> None:
        """The key was not in the set, and is now."""
        if self._net.pop(key, None) is None:
            self._net[key] = True

    def lose(self, key: K) -> None:
        """The key was in the set, and is not any more."""
        if self._net.pop(key, None) is None:
            self._net[key] = False

    def gained(self) -> list[K]:
        """Keys that are in the set and were not."""
        return [key for key, gained in self._net.items() if gained]

    def lost(self) -> list[K]:
        """Keys that were in the set and are not."""
        return [key for key, gained in self._net.items() if not gained]

    def clear(self) -> None:
        """Count from now on."""
        self._net.clear()
