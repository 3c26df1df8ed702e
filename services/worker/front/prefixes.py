"""Which prefixes one engine's cache holds, as the load reports tell it: all of them, or what changed.

A prefix is a number, its wire hash of `tokenloom.contract.prefix`. Bound: one for each 512 tokens of the
cache, whatever the engine says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from services.worker.core.changes import NetChanges
from tokenloom.contract.prefix import WIRE_STRIDE


class PrefixNews(NamedTuple):
    """What one report says."""

    whole: bool
    """`stored` is all there is."""
    stored: list[int]
    evicted: list[int]


class Prefixes:
    """The prefixes of one engine, over all lives of its process. A new process has none."""

    __slots__ = ("_anew", "_changes", "_held", "_held_max")

    def __init__(self) -> None:
        self._held: dict[int, None] = {}
        self._held_max = 0
        self._changes: NetChanges[int] = NetChanges()
        self._anew = True
        """Whether the next report must say everything to everybody."""

    def begin(self, total_blocks: int) -> None:
        """A process with a cache of so many blocks is ready; nothing is in it."""
        self._held.clear()
        self._held_max = total_blocks // WIRE_STRIDE
        self._changes.clear()
        self._anew = True

    def end(self) -> None:
        """The process is gone, and its cache with it."""
        self.begin(0)

    def apply(self, stored: Iterable[int], evicted: Iterable[int]) -> None:
        """What a step changed."""
        for key in evicted:
            if key in self._held:
                del self._held[key]
                self._changes.lose(key)
        for key in stored:
            if key not in self._held and len(self._held) < self._held_max:
                self._held[key] = None
                self._changes.gain(key)

    def take(self) -> PrefixNews | None:
        """For a report: what is new since the one before; None: nothing."""
        changes = self._changes
        if self._anew:
            news = PrefixNews(True, list(self._held), [])
        elif changes:
            news = PrefixNews(False, changes.gained(), changes.lost())
        else:
            return None
        self._anew = False
        changes.clear()
        return news

    def told(self) -> PrefixNews:
        """Everything that reports have told so far, for who did not hear them all.

        What changed since is left to the next one. When the process ended since, that is nothing.
        """
        since = self._changes
        gained = set(since.gained())
        return PrefixNews(True, [*(key for key in self._held if key not in gained), *since.lost()], [])
