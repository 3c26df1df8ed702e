"""The requests that wait for one model: strict priority bands, each in order of first arrival.

It decides the order and nothing else; a fairer order inside a band replaces the band's list. No
operation walks the queue: bands are sorted lists, searched by bisection.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from services.batcher.core.messages import PRIORITY_DEFAULT, PRIORITY_LAST

if TYPE_CHECKING:
    from services.batcher.core.entry import Entry

Key = tuple[int, int]
"""(first arrival in Unix milliseconds, ticket)."""

PACE_WEIGHT = 0.1
"""Share of the newest gap in the mean gap between two dispatches."""


def band_of(priority: int) -> int:
    """The band that a request's priority means."""
    return priority or PRIORITY_DEFAULT


class ModelQueue:
    """Who waits for one model version."""

    __slots__ = ("_bands", "_gap_s", "_placed_at", "by_ticket", "model", "prompt_tokens", "watched")

    def __init__(self, model: str) -> None:
        self.model = model
        self.by_ticket: dict[int, Entry] = {}
        """In the order of entering here, which is not the order of arrival."""
        self.prompt_tokens = 0
        self.watched = False
        """A timer looks after this queue while no worker serves the model."""
        self._bands: tuple[list[Key], ...] = tuple([] for _ in range(PRIORITY_LAST))
        self._gap_s = 0.0
        self._placed_at: float | None = None

    def __len__(self) -> int:
        return len(self.by_ticket)

    def push(self, entry: Entry) -> None:
        """Let a request wait."""
        request = entry.request
        insort(self._bands[band_of(request.priority) - 1], (request.arrival_unix_ms, entry.ticket))
        self.by_ticket[entry.ticket] = entry
        self.prompt_tokens += request.prompt_tokens

    def remove(self, entry: Entry) -> None:
        """Take a waiting request out, wherever it stands. Raises KeyError when it is not here."""
        del self.by_ticket[entry.ticket]
        request = entry.request
        band = self._bands[band_of(request.priority) - 1]
        del band[bisect_left(band, (request.arrival_unix_ms, entry.ticket))]
        self.prompt_tokens -= request.prompt_tokens

    def head(self) -> Entry | None:
        """Who is next."""
        for band in self._bands:
            if band:
                return self.by_ticket[band[0][1]]
        return None

    def position(self, entry: Entry) -> int:
        """How many are ahead of a request that waits here."""
        mine = band_of(entry.request.priority) - 1
        ahead = sum(len(band) for band in self._bands[:mine])
        return ahead + bisect_left(self._bands[mine], (entry.request.arrival_unix_ms, entry.ticket))

    def oldest(self) -> Entry | None:
        """Who has been here longest."""
        return next(iter(self.by_ticket.values()), None)

    def held_for(self, hold_s: float, now: float) -> list[Entry]:
        """Those who have been here for `hold_s` or longer, longest first."""
        found: list[Entry] = []
        for entry in self.by_ticket.values():
            if entry.entered + hold_s > now:
                break
            found.append(entry)
        return found

    def depth_by_band(self) -> dict[int, int]:
        """Requests waiting in each band that has any."""
        return {number: len(band) for number, band in enumerate(self._bands, 1) if band}

    def note_placed(self, now: float) -> None:
        """A request left for a worker: remember the pace."""
        if self._placed_at is not None:
            self._gap_s += PACE_WEIGHT * (now - self._placed_at - self._gap_s)
        self._placed_at = now

    def drain_estimate_s(self) -> float:
        """Seconds until those now waiting are placed, at the present pace; 0 while it is unknown."""
        return self._gap_s * len(self.by_ticket)
