"""The driver on a clock that tests move: what it wakes, times and counts."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from services.batcher.core.messages import Dispatch, Reject, Verdict
from services.batcher.core.scheduler import Scheduler
from services.batcher.driver import Driver
from services.batcher.metrics import BatcherMetrics
from tests.unit.batcher.words import MODEL, limits, model_report, report, request
from tokenloom.kit.clock import FakeClock, SystemClock
from tokenloom.kit.errors import CallError


class Loader:
    """Remembers what was asked."""

    def __init__(self):
        self.asked = []

    def load(self, endpoint, model, listener):
        self.asked.append((endpoint, model, listener))


class Room:
    """A driver, its clock and its counts."""

    def __init__(self, clock=None, watchers_max=10, **changes):
        self.registry = CollectorRegistry()
        self.clock = clock or FakeClock()
        scheduler = Scheduler(limits(**changes), "lease")
        self.loader = Loader()
        metrics = BatcherMetrics(self.registry)
        self.driver = Driver(scheduler, self.clock, metrics, self.loader, watchers_max=watchers_max)
        self.driver.found("w1")

    def report(self, free):
        self.driver.reported("w1", report(model_report(free)))

    def counted(self, outcome, reason=""):
        labels = {"outcome": outcome, "reason": reason, "band": "standard"}
        return self.registry.get_sample_value("tokenloom_batcher_requests_total", labels) or 0

    def arrive(self, name="a", **fields):
        return self.driver.arrived(request(name, **fields))


async def test_a_request_that_can_start_is_decided_before_anybody_waits():
    room = Room()
    room.report(1)
    stay = room.arrive()
    assert isinstance(stay.decision, Dispatch)
    assert await stay.wait() is stay.decision
    assert room.counted("dispatched") == 1


async def test_a_held_stream_wakes_with_its_decision():
    room = Room()
    room.report(0)
    stay = room.arrive()
    waiting = asyncio.create_task(stay.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    room.clock.advance(0.1)
    room.report(1)
    decision = await waiting
    assert decision.waited_s == pytest.approx(0.1)
    assert stay.decided_ns - stay.arrived_ns == pytest.approx(1e8, rel=1e-3)


async def test_the_timer_refuses_what_expires():
    room = Room(SystemClock())
    room.report(0)
    stay = room.arrive(deadline=room.clock.monotonic() + 0.05)
    async with asyncio.timeout(5):
        decision = await stay.wait()
    assert isinstance(decision, Reject)
    assert decision.reason == "DEADLINE_UNREACHABLE"
    assert room.clock.monotonic() >= stay.request.deadline
    room.driver.close()


async def test_an_earlier_deadline_moves_the_timer_forward():
    room = Room(SystemClock())
    room.report(0)
    now = room.clock.monotonic()
    room.arrive("late", deadline=now + 1000)
    early = room.arrive("early", deadline=now + 0.05)
    async with asyncio.timeout(5):
        assert (await early.wait()).reason == "DEADLINE_UNREACHABLE"
    room.driver.close()


async def test_the_end_of_a_refused_requests_stream_changes_nothing():
    room = Room(queue_depth_max=1)
    room.report(0)
    room.arrive("a")
    stay = room.arrive("b")
    assert stay.decision.reason == "QUEUE_FULL"
    room.driver.answered(stay, "")
    room.driver.ended(stay, None)
    assert (room.counted("refused", "QUEUE_FULL"), room.counted("cancelled")) == (1, 0)


async def test_a_caller_that_leaves_is_counted_once():
    room = Room()
    room.report(0)
    stay = room.arrive()
    room.driver.ended(stay, None)
    room.driver.ended(stay, None)
    assert room.counted("cancelled") == 1


async def test_drained_returns_when_the_last_one_that_waited_is_gone():
    room = Room()
    room.report(0)
    first, second = room.arrive("a"), room.arrive("b")
    assert room.driver.drain() == 2
    drained = asyncio.create_task(room.driver.drained())
    room.driver.ended(first, None)
    await asyncio.sleep(0)
    assert not drained.done()
    room.driver.ended(second, None)
    async with asyncio.timeout(1):
        await drained


async def test_closing_wakes_everybody_with_a_refusal():
    room = Room()
    room.report(0)
    stays = [room.arrive(name) for name in "abc"]
    room.driver.close()
    assert {stay.decision.reason for stay in stays} == {"DRAINING"}


async def test_a_lost_worker_is_counted_and_not_chosen():
    room = Room()
    room.report(1)
    room.driver.lost("w1")
    assert room.arrive().decision is None
    turns = room.registry.get_sample_value("tokenloom_batcher_worker_turns_total", {"state": "lost"})
    assert turns == 1


async def test_refusals_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr("services.batcher.watchers.REFUSALS_KEPT_MAX", 2)
    room = Room(queue_depth_max=1)
    room.report(0)
    for name in ("held", "r1", "r2", "r3"):
        room.arrive(name)
    follow = room.driver.watchers.follow
    monkeypatch.setattr("services.batcher.watchers.ARRIVAL_WAIT_S", 0.01)
    assert [told.reason async for told in follow("r3")] == ["QUEUE_FULL"]
    with pytest.raises(CallError, match="r1"):
        _ = [told async for told in follow("r1")]
    assert not room.driver.watchers


async def test_a_refusal_is_forgotten_when_the_request_comes_again_and_is_placed():
    room = Room(queue_depth_max=1)
    room.report(0)
    room.arrive("held", arrival=1)
    room.arrive("a")
    room.report(2)
    again = room.arrive("a")
    told = [what async for what in room.driver.watchers.follow("a")]
    assert [place.endpoint for place in told] == ["w1"]
    room.driver.ended(again, None)


async def test_a_model_that_nobody_has_is_loaded_and_what_came_of_it_is_counted():
    room = Room()
    load = report()._replace(loads_on_demand=True)
    room.driver.reported("w1", load)
    stay = room.arrive()
    ((endpoint, model, listener),) = room.loader.asked
    assert (endpoint, model, listener) == ("w1", MODEL, room.driver)
    room.driver.load_ended(endpoint, model, Verdict("MODEL_UNSUPPORTED", "its layers are recurrent", {}))
    decision = await stay.wait()
    assert decision.reason == "MODEL_UNSUPPORTED"
    labels = {"outcome": "refused", "reason": "MODEL_UNSUPPORTED"}
    assert room.registry.get_sample_value("tokenloom_batcher_model_loads_total", labels) == 1
