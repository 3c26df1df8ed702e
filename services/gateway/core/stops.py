"""Finding stop strings in text that comes in pieces, without letting their beginning out.

The text ends before the stop string that is complete first; of several that end at the same
character, before the longest. So the result does not depend on how the text was cut into pieces.
Held back is the longest suffix that may still become a stop string: at most STOP_CHARS_MAX - 1
characters. Cost: constant for each character and stop string (Knuth, Morris and Pratt, 1977).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """Text that may be shown, and the stop string that ends it, if one does."""

    text: str
    matched: str | None = None


class StopScanner:
    """Watches one output. After a match nothing may be pushed any more."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`stops`: non-empty strings, longest first at equal ends; duplicates do no harm."""
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._include = include_stop
        self._states = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> Scan:
        """What `text` lets out; it may hold earlier text that was held back."""
        if not self._held and self._firsts.isdisjoint(text):
            return Scan(text)
        pending = self._held + text
        for position in range(len(self._held), len(pending)):
            matched = self._step(pending[position])
            if matched is not None:
                self._held = ""
                end = position + 1 if self._include else position + 1 - len(matched)
                return Scan(pending[:end], matched)
        hold = max(self._states)
        cut = len(pending) - hold
        self._held = pending[cut:]
        return Scan(pending[:cut])

    def flush(self) -> str:
        """What was held back: the output ended, and it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Advance every automaton; the longest stop string that `character` completes."""
        matched = None
        for number, stop in enumerate(self._stops):
            failure, state = self._failures[number], self._states[number]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                matched = matched or stop
                state = failure[state - 1]
            self._states[number] = state
        return matched


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = table[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        table[position] = length
    return table
