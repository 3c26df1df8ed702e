"""Two steps on their way: what is launched when, and what happens when one cannot be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from services.worker.engine.config import EngineConfig
from services.worker.engine.pipeline import Launches, depth_of


@dataclass(frozen=True)
class Flight:
    number: int
    looks_back: bool = False


@dataclass
class Engine:
    """Begins what it is given, and notes what it is asked to do."""

    flights: deque[Flight | None]
    short_of_memory: frozenset[int] = frozenset()
    said: list[str] = field(default_factory=list)
    ahead: bool = True

    def begin(self):
        flight = self.flights.popleft() if self.flights else None
        self.said.append(f"begin {flight.number}" if flight else "begin nothing")
        return flight

    def launch(self, flight):
        self.said.append(f"launch {flight.number}")
        return None if flight.number in self.short_of_memory else flight

    def wait(self, pending):
        self.said.append(f"wait {pending.number}")
        return pending.number

    def settle(self, drawn):
        self.said.append(f"settle {drawn}")
        return f"landing {drawn}"


def turns(engine: Engine, count: int) -> list[str | None]:
    pipeline = Launches(engine)  # type: ignore[arg-type]
    return [pipeline.turn() for _ in range(count)]  # type: ignore[misc]


def test_the_next_step_is_launched_before_the_present_one_is_waited_for():
    engine = Engine(deque([Flight(0), Flight(1), Flight(2)]))
    assert turns(engine, 5) == [None, "landing 0", "landing 1", "landing 2", None]
    assert engine.said == [
        *("begin 0", "launch 0"),
        *("begin 1", "launch 1", "wait 0", "settle 0"),
        *("begin 2", "launch 2", "wait 1", "settle 1"),
        *("begin nothing", "wait 2", "settle 2"),
        "begin nothing",
    ]


def test_a_step_that_looks_back_is_launched_after_the_one_before_was_settled():
    engine = Engine(deque([Flight(0), Flight(1, looks_back=True)]))
    assert turns(engine, 3) == [None, "landing 0", "landing 1"]
    assert engine.said[2:6] == ["begin 1", "wait 0", "settle 0", "launch 1"]


def test_a_step_that_cannot_be_launched_is_taken_back_before_anything_else_begins():
    engine = Engine(deque([Flight(0), Flight(1), Flight(2)]), short_of_memory=frozenset({1}))
    assert turns(engine, 4) == [None, "landing 0", "landing None", None]
    assert engine.said[-3:] == ["settle None", "begin 2", "launch 2"]


def test_closing_waits_for_what_was_launched():
    engine = Engine(deque([Flight(0)]))
    pipeline = Launches(engine)  # type: ignore[arg-type]
    pipeline.turn()
    assert pipeline.busy
    pipeline.close()
    assert engine.said == ["begin 0", "launch 0", "wait 0"]


@pytest.mark.parametrize(
    ("configured", "ahead", "depth"), [(0, True, 2), (0, False, 1), (1, True, 1), (2, False, 2)]
)
def test_the_depth_is_the_devices_unless_it_was_configured(configured, ahead, depth):
    assert depth_of(EngineConfig(model_dir="", pipeline_depth=configured), ahead) == depth
