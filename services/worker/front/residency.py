"""Who may have a worker's memory: which models leave for another, who must wait, who is refused.

Events and the time come in, decisions go out; no loop, no clock, no engines. A model's memory is reserved
before its engine starts and given back when its engine is gone, so that the sum never exceeds the budget.
Those who wait are served in the order in which they came. Nobody is let wait for memory that is not
certain to come: what is free and what is leaving cover all who wait, so there is no deadlock; whoever
would need a model to leave that may not leave yet is refused, and told how long that lasts.

Who leaves: of the models that were ready once, are not inside their minimum dwell and are not leaving, the
idle ones first, the one not used for longest first; then the busy ones, by their last start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from services.worker.front.memory import Budget

FIRST_USE_S = 2.0
"""A model that nobody used yet may not be evicted for so long, however short the minimum dwell: whoever
had it loaded is on the way."""


class Place(Enum):
    """What of the memory a model has."""

    WAITING = "waiting"
    """None yet; what leaves is for it."""
    HELD = "held"
    LEAVING = "leaving"
    """Still all of it: its sequences end, or its process does."""


@dataclass(frozen=True, slots=True)
class Use:
    """How a model was used, in seconds of one clock."""

    ready_s: float | None = None
    """When it could serve for the first time; None: it is still being loaded."""
    started_s: float | None = None
    """When its last sequence began; None: there was none."""
    ended_s: float | None = None
    """When its last sequence ended."""
    busy: bool = False
    """Whether a sequence is here."""

    def dwell_left_s(self, min_dwell_s: float, now_s: float) -> float:
        """How long it may not be evicted yet; of a model that is being loaded, at least that."""
        dwell_s = min_dwell_s if self.started_s is not None else max(min_dwell_s, FIRST_USE_S)
        return dwell_s if self.ready_s is None else max(0.0, self.ready_s + dwell_s - now_s)

    def idle_s(self, now_s: float) -> float:
        """Since it was last used, or could be."""
        since = [at for at in (self.ready_s, self.started_s, self.ended_s) if at is not None]
        return 0.0 if self.busy or not since else max(0.0, now_s - max(since))

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower leaves first."""
        last = [at for at in (self.ready_s, self.started_s, self.ended_s) if at is not None]
        return self.busy, (self.started_s or 0.0) if self.busy else max(last, default=0.0)


@dataclass(frozen=True, slots=True)
class Admitted:
    """It is taken in. It has its memory, or waits until those that must leave are gone."""

    held: bool
    evict: tuple[str, ...] = ()
    """These must begin to leave."""
    hurry: tuple[str, ...] = ()
    """These leave already, and somebody waits for it."""


@dataclass(frozen=True, slots=True)
class TooLarge:
    """It never fits, whoever leaves."""

    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Busy:
    """It would fit if others left, and they may not, or may not yet."""

    free_bytes: int
    budget_bytes: int
    retry_s: float
    """Until enough may be evicted, at least."""
    models: int
    """Resident, or on their way."""
    lacks_memory: bool
    """Otherwise a place: `models_max` are here."""


Answer = Admitted | TooLarge | Busy
UseOf = Callable[[str], Use]


class Residency:
    """The models of one worker and their memory, by version digest."""

    def __init__(self, budget: Budget, *, models_max: int, min_dwell_s: float) -> None:
        self.budget = budget
        self._models_max = models_max
        self._min_dwell_s = min_dwell_s
        self._places: dict[str, Place] = {}
        """Those that wait in the order in which they came."""
        self._needs: dict[str, int] = {}

    def place(self, digest: str) -> Place | None:
        """None: not here."""
        return self._places.get(digest)

    @property
    def unpromised_bytes(self) -> int:
        """What is free and not meant for somebody who waits."""
        return max(0, min(self.budget.free_bytes, self._certain_bytes()))

    def ask(self, digest: str, need_bytes: int, *, evict: bool, now_s: float, use_of: UseOf) -> Answer:
        """A model is to become resident. Raises ValueError when it is here."""
        if digest in self._places:
            raise ValueError(f"{digest} is here already")
        if self.budget.total_bytes and need_bytes > self.budget.total_bytes:
            return TooLarge(self.budget.total_bytes)
        victims = self._victims(need_bytes, now_s, use_of) if evict else []
        if not self._suffices(need_bytes, victims):
            return self._busy(need_bytes, now_s, use_of)
        for victim in victims:
            self._places[victim] = Place.LEAVING
        self._places[digest], self._needs[digest] = Place.WAITING, need_bytes
        held = digest in self._grant()
        hurry = () if held else tuple(d for d in self._at(Place.LEAVING) if d not in victims)
        return Admitted(held, tuple(victims), hurry)

    def leave(self, digest: str) -> None:
        """A model goes by command, dwell or not. Raises KeyError when it is not here."""
        if self._places[digest] is Place.HELD:
            self._places[digest] = Place.LEAVING

    def gone(self, digest: str) -> list[str]:
        """It has no process any more, or never got one; those that have their memory now."""
        self._places.pop(digest, None)
        self._needs.pop(digest, None)
        self.budget.release(digest)
        return self._grant()

    def _at(self, place: Place) -> list[str]:
        return [digest for digest, at in self._places.items() if at is place]

    def _bytes_at(self, place: Place) -> int:
        return sum(self._needs[digest] for digest in self._at(place))

    def _certain_bytes(self) -> int:
        """What a newcomer could have once all that leaves is gone and all that waits was served."""
        return self.budget.free_bytes + self._bytes_at(Place.LEAVING) - self._bytes_at(Place.WAITING)

    def _suffices(self, need_bytes: int, victims: Sequence[str]) -> bool:
        """Whether it would have room once these were gone too."""
        freed = sum(self._needs[digest] for digest in victims)
        staying = len(self._places) - len(self._at(Place.LEAVING)) - len(victims)
        fits = not self.budget.total_bytes or need_bytes <= self._certain_bytes() + freed
        return fits and staying < self._models_max

    def _victims(self, need_bytes: int, now_s: float, use_of: UseOf) -> list[str]:
        """The fewest of those not used for longest; all that may leave, when even they do not suffice."""
        uses = {digest: use_of(digest) for digest in self._at(Place.HELD)}
        may_leave = [
            digest
            for digest, use in uses.items()
            if use.ready_s is not None and use.dwell_left_s(self._min_dwell_s, now_s) <= 0
        ]
        may_leave.sort(key=lambda digest: uses[digest].rank)
        chosen: list[str] = []
        for digest in may_leave:
            if self._suffices(need_bytes, chosen):
                break
            chosen.append(digest)
        # A small one that was chosen first may stay when a larger one behind it gives enough.
        for digest in reversed(chosen[:]):
            others = [other for other in chosen if other != digest]
            if self._suffices(need_bytes, others):
                chosen = others
        return chosen

    def _busy(self, need_bytes: int, now_s: float, use_of: UseOf) -> Busy:
        staying = self._at(Place.HELD) + self._at(Place.WAITING)
        lefts = {digest: use_of(digest).dwell_left_s(self._min_dwell_s, now_s) for digest in staying}
        going: list[str] = []
        retry_s = 0.0
        for digest in sorted(lefts, key=lambda one: lefts[one]):
            if self._suffices(need_bytes, going):
                break
            going.append(digest)
            retry_s = lefts[digest]
        return Busy(
            free_bytes=self.unpromised_bytes,
            budget_bytes=self.budget.total_bytes,
            retry_s=retry_s,
            models=len(self._places),
            lacks_memory=bool(self.budget.total_bytes) and need_bytes > max(0, self._certain_bytes()),
        )

    def _grant(self) -> list[str]:
        """Gives memory and a place to those who wait, in their order, as far as there is."""
        granted: list[str] = []
        for digest in self._at(Place.WAITING):
            there = len(self._places) - len(self._at(Place.WAITING))
            if there >= self._models_max or not self.budget.reserve(digest, self._needs[digest]):
                break
            self._places[digest] = Place.HELD
            granted.append(digest)
        return granted
