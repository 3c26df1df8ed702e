"""Who leaves, who waits, who is refused: the decisions alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.worker.front.memory import Budget
from services.worker.front.residency import FIRST_USE_S, Admitted, Busy, Place, Residency, TooLarge, Use

DWELL_S = 100.0


@dataclass
class Models:
    """A residency of a budget, and how its models were used."""

    budget: int = 30
    models_max: int = 8
    now_s: float = 1000.0
    uses: dict[str, Use] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.residency = Residency(Budget(self.budget), models_max=self.models_max, min_dwell_s=DWELL_S)

    def ask(self, name: str, need: int, *, evict: bool = True) -> Admitted | TooLarge | Busy:
        answer = self.residency.ask(
            name, need, evict=evict, now_s=self.now_s, use_of=lambda one: self.uses.get(one, Use())
        )
        if isinstance(answer, Admitted):
            self.uses[name] = Use()
        return answer

    def resident(self, name: str, need: int, ready_s: float = 0.0, **use: float | bool) -> None:
        """One that is here since long, and was used."""
        assert self.ask(name, need, evict=False) == Admitted(held=True)
        self.uses[name] = replace(Use(ready_s, started_s=ready_s, ended_s=ready_s), **use)  # type: ignore[arg-type]


def test_model_is_held_at_once_where_there_is_room() -> None:
    models = Models()
    assert models.ask("a", 20) == Admitted(held=True)
    assert models.ask("b", 10, evict=False) == Admitted(held=True)
    assert (models.residency.budget.used_bytes, models.residency.unpromised_bytes) == (30, 0)


def test_what_never_fits_is_refused_whoever_would_leave() -> None:
    models = Models()
    models.resident("a", 30)
    assert models.ask("b", 31) == TooLarge(30)
    assert models.residency.place("b") is None


def test_longest_unused_idle_model_leaves_first() -> None:
    models = Models()
    models.resident("a", 10, ended_s=500.0)
    models.resident("b", 10, ended_s=300.0)
    models.resident("c", 10, ended_s=400.0)
    assert models.ask("d", 10) == Admitted(held=False, evict=("b",))
    assert models.ask("e", 10) == Admitted(held=False, evict=("c",), hurry=("b",))


def test_busy_models_leave_after_all_idle_ones_by_their_last_start() -> None:
    models = Models()
    models.resident("a", 10, started_s=700.0, busy=True)
    models.resident("b", 10, started_s=600.0, busy=True)
    models.resident("c", 10, started_s=800.0, ended_s=900.0)
    assert models.ask("d", 20) == Admitted(held=False, evict=("c", "b"))


def test_no_more_leave_than_is_needed() -> None:
    models = Models()
    models.resident("small", 5, ended_s=100.0)
    models.resident("large", 25, ended_s=200.0)
    assert models.ask("d", 20) == Admitted(held=False, evict=("large",))


def test_memory_is_given_only_when_the_one_that_leaves_is_gone() -> None:
    models = Models()
    models.resident("a", 30)
    assert models.ask("b", 20) == Admitted(held=False, evict=("a",))
    assert models.residency.place("b") is Place.WAITING
    assert models.residency.budget.used_bytes == 30
    assert models.residency.gone("a") == ["b"]
    assert models.residency.budget.used_bytes == 20


def test_those_who_wait_are_served_in_their_order() -> None:
    models = Models()
    models.resident("a", 10)
    models.resident("b", 20)
    assert models.ask("large", 25) == Admitted(held=False, evict=("a", "b"))
    assert models.ask("small", 5, evict=False) == Admitted(held=False, hurry=("a", "b"))
    assert models.residency.gone("a") == [], "10 would be enough for the small one, which came later"
    assert models.residency.gone("b") == ["large", "small"]


def test_model_inside_its_dwell_stays_and_the_refusal_says_how_long() -> None:
    models = Models()
    models.resident("a", 15, ready_s=940.0)
    models.resident("b", 15, ready_s=990.0)
    assert models.ask("c", 10) == Busy(
        free_bytes=0, budget_bytes=30, retry_s=40.0, models=2, lacks_memory=True
    )
    both = models.ask("c", 20)
    assert isinstance(both, Busy)
    assert both.retry_s == 90.0
    models.now_s += 40
    assert models.ask("c", 10) == Admitted(held=False, evict=("a",))


def test_model_that_is_being_loaded_is_never_evicted() -> None:
    models = Models()
    models.ask("a", 30)
    models.now_s += 10 * DWELL_S
    busy = models.ask("b", 10)
    assert isinstance(busy, Busy)
    assert busy.retry_s == DWELL_S, "its dwell begins when it is ready"


def test_model_that_nobody_used_yet_is_spared_for_a_moment_without_any_dwell() -> None:
    models = Models()
    models.residency._min_dwell_s = 0.0
    models.ask("a", 30)
    models.uses["a"] = Use(ready_s=models.now_s)
    busy = models.ask("b", 10)
    assert isinstance(busy, Busy)
    assert busy.retry_s == FIRST_USE_S
    models.uses["a"] = Use(models.now_s, models.now_s, models.now_s)
    assert models.ask("b", 10) == Admitted(held=False, evict=("a",))


def test_without_evict_nobody_leaves() -> None:
    models = Models()
    models.resident("a", 25)
    assert models.ask("b", 10, evict=False) == Busy(5, 30, 0.0, 1, True)
    assert models.residency.place("a") is Place.HELD


def test_memory_that_somebody_waits_for_is_nobody_elses() -> None:
    models = Models()
    models.resident("a", 20)
    models.residency.leave("a")
    assert models.ask("b", 25) == Admitted(held=False, hurry=("a",))
    assert models.residency.unpromised_bytes == 5
    assert models.ask("c", 6) == Busy(5, 30, DWELL_S, 2, True)
    assert models.ask("d", 5) == Admitted(held=False, hurry=("a",))


def test_place_is_as_scarce_as_memory() -> None:
    models = Models(models_max=2)
    models.resident("a", 1)
    models.resident("b", 1, ended_s=5.0)
    busy = models.ask("c", 1, evict=False)
    assert isinstance(busy, Busy)
    assert (busy.lacks_memory, busy.models) == (False, 2)
    assert models.ask("c", 1) == Admitted(held=False, evict=("a",))
    assert models.residency.gone("a") == ["c"]


def test_without_a_budget_only_places_count() -> None:
    models = Models(budget=0, models_max=1)
    models.resident("a", 1 << 50)
    assert models.residency.unpromised_bytes == 0
    assert isinstance(models.ask("b", 1, evict=False), Busy)
    assert models.ask("b", 1 << 50) == Admitted(held=False, evict=("a",))


def test_one_that_is_here_cannot_ask_again() -> None:
    models = Models()
    models.resident("a", 1)
    with pytest.raises(ValueError, match="here already"):
        models.ask("a", 1)


NAMES = st.sampled_from("abcdefgh")


class Histories(RuleBasedStateMachine):
    """Loads, unloads, ends, crashes and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.models = Models(budget=30, models_max=5)
        self.waiting: list[str] = []

    def _places(self) -> dict[str, Place]:
        return self.models.residency._places

    def _one(self, name: str, place: Place) -> str | None:
        found = sorted(d for d, at in self._places().items() if at is place)
        return found[ord(name) % len(found)] if found else None

    @rule(name=NAMES, need=st.integers(1, 33), evict=st.booleans())
    def load(self, name: str, need: int, evict: bool) -> None:
        if name in self._places():
            return
        models, before = self.models, dict(self._places())
        answer = models.ask(name, need, evict=evict)
        if isinstance(answer, TooLarge):
            assert need > models.budget
        elif isinstance(answer, Busy):
            assert self._places() == before, "a refusal changes nothing"
            assert need <= models.budget
            if evict:
                assert answer.retry_s > 0
        else:
            assert evict or not answer.evict
            for victim in answer.evict:
                use = models.uses[victim]
                assert before[victim] is Place.HELD
                assert use.ready_s is not None, "still being loaded"
                assert models.now_s - use.ready_s >= DWELL_S
            if not answer.held:
                self.waiting.append(name)

    @rule(name=NAMES)
    def becomes_ready(self, name: str) -> None:
        one = self._one(name, Place.HELD)
        if one is not None and self.models.uses[one].ready_s is None:
            self.models.uses[one] = Use(ready_s=self.models.now_s)

    @rule(name=NAMES, ends=st.booleans())
    def is_used(self, name: str, ends: bool) -> None:
        one, now_s = self._one(name, Place.HELD), self.models.now_s
        if one is not None and self.models.uses[one].ready_s is not None:
            ended = {"ended_s": now_s} if ends else {}
            self.models.uses[one] = replace(self.models.uses[one], started_s=now_s, busy=not ends, **ended)

    @rule(name=NAMES)
    def is_unloaded(self, name: str) -> None:
        one = self._one(name, Place.HELD)
        if one is not None:
            self.models.residency.leave(one)

    @rule(name=NAMES, place=st.sampled_from(Place))
    def ends(self, name: str, place: Place) -> None:
        """An engine that left is gone, a load failed, or one that waited was unloaded."""
        one = self._one(name, place)
        if one is not None:
            self._gone(one)

    @rule(seconds=st.floats(0.1, 2 * DWELL_S))
    def time_passes(self, seconds: float) -> None:
        self.models.now_s += seconds

    @precondition(lambda self: Place.WAITING in self._places().values())
    @rule()
    def all_that_leave_are_gone(self) -> None:
        """Then nobody waits any more: there is no deadlock."""
        for digest in [d for d, at in self._places().items() if at is Place.LEAVING]:
            self._gone(digest)
        assert Place.WAITING not in self._places().values()

    def _gone(self, digest: str) -> None:
        if digest in self.waiting:
            self.waiting.remove(digest)
        for granted in self.models.residency.gone(digest):
            assert granted == self.waiting.pop(0), "in the order of arrival"

    @invariant()
    def budget_and_places_are_kept(self) -> None:
        residency = self.models.residency
        there = [digest for digest, at in self._places().items() if at is not Place.WAITING]
        assert len(there) <= 5
        assert sum(residency._needs[digest] for digest in there) == residency.budget.used_bytes <= 30
        assert 0 <= residency.unpromised_bytes <= residency.budget.free_bytes


Histories.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase
