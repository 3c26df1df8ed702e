"""Models that nobody has: who is asked to load them, who waits, who is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.batcher.core.messages import Dispatch, LoadModel, ModelState, Verdict
from services.batcher.core.residency import (
    BEGIN_S,
    LOOK_S,
    VERDICT_KEEP_S,
    Residency,
    outlook_on,
)
from tests.unit.batcher.shop import GIB, THIRD, TOO_LARGE, Shop, busy_until, coming, resident
from tests.unit.batcher.words import MODEL, OTHER, model_report


def test_many_requests_for_a_model_that_nobody_has_cause_one_load():
    shop = Shop()
    shop.worker()
    for number in range(50):
        shop.want(f"r{number}")
    assert shop.asked() == [("w1", MODEL)]
    shop.worker("w1", coming())
    shop.ended()
    shop.worker("w1", model_report(64, blocks=10_000, memory_bytes=GIB))
    assert len(shop.dispatches()) == 50
    shop.beat(3 * VERDICT_KEEP_S, "w1", models=[model_report(64, blocks=10_000)])
    assert shop.asked() == [("w1", MODEL)]


def test_a_waiting_request_sees_where_its_model_is_being_loaded():
    shop = Shop()
    shop.worker()
    shop.want("a")
    place = shop.scheduler.place_of("a", shop.now)
    assert (place.endpoint, place.progress) == ("w1", 0.0)
    shop.worker("w1", coming(0.25))
    place = shop.scheduler.place_of("a", shop.now)
    assert (place.position, place.endpoint, place.progress) == (0, "w1", 0.25)


def test_a_worker_that_does_not_load_on_demand_is_not_asked():
    shop = Shop(no_worker_hold_s=5.0)
    shop.worker(on_demand=False)
    shop.want("a")
    shop.wait(6)
    assert shop.asked() == []
    assert shop.refused() == [("a", "NO_CAPACITY")]


def test_a_worker_that_comes_while_somebody_waits_is_asked():
    shop = Shop(no_worker_hold_s=5.0)
    shop.want("a")
    shop.wait(1)
    shop.worker()
    shop.wait(0.15)
    assert shop.asked() == []
    shop.worker()
    shop.beat(LOOK_S, "w1")
    assert shop.asked() == [("w1", MODEL)]


def test_free_memory_is_taken_before_anything_is_evicted():
    shop = Shop()
    shop.worker("w1", resident(memory=3 * GIB))
    shop.worker("w2", resident(memory=GIB))
    shop.want()
    assert shop.asked() == [("w2", MODEL)]


def test_what_nobody_used_for_long_is_evicted_first():
    shop = Shop()
    shop.worker("w1", resident(memory=3 * GIB, idle=1.0))
    shop.worker("w2", resident(memory=3 * GIB, idle=1_000.0))
    shop.want()
    assert shop.asked() == [("w2", MODEL)]


def test_what_runs_is_spared_for_what_is_idle():
    shop = Shop()
    shop.worker("w1", resident(memory=3 * GIB, idle=0.0, running=1))
    shop.worker("w2", resident(memory=3 * GIB, idle=5.0))
    shop.want()
    assert shop.asked() == [("w2", MODEL)]


def test_nobody_is_asked_while_what_is_there_must_stay():
    shop = Shop()
    busy = resident(memory=3 * GIB, dwell=20.0)
    shop.worker("w1", busy)
    shop.want("a")
    shop.beat(10, "w1", models=[busy._replace(dwell_left_s=10.0)])
    assert (shop.asked(), shop.refused()) == ([], [])
    shop.beat(LOOK_S + 0.1, "w1", models=[busy._replace(dwell_left_s=0.0)])
    assert shop.asked() == [("w1", MODEL)]


def test_a_short_wait_for_memory_beats_a_dear_eviction():
    shop = Shop()
    shop.worker("w1", resident(memory=3 * GIB, dwell=1.0, idle=5_000.0))
    shop.worker("w2", resident(memory=3 * GIB, idle=0.0, running=4))
    shop.want()
    assert shop.asked() == []


def test_a_worker_that_is_silent_for_a_moment_ends_nobodys_wait():
    shop = Shop(loading_hold_s=600.0, hold_max_s=600.0, no_worker_hold_s=5.0)
    busy = resident(memory=3 * GIB, dwell=1_000.0)
    shop.worker("w1", busy)
    shop.want("a")
    shop.beat(60, "w1", models=[busy])
    shop.wait(4)
    shop.beat(60, "w1", models=[busy])
    assert shop.refused() == []
    shop.wait(6)
    assert shop.refused() == [("a", "NO_CAPACITY")]


def test_who_waits_for_memory_is_refused_in_words_in_the_end():
    shop = Shop(loading_hold_s=30.0, hold_max_s=600.0)
    busy = resident(memory=3 * GIB, dwell=1_000.0)
    shop.worker("w1", busy)
    shop.want("a")
    shop.beat(31, "w1", models=[busy])
    (refusal,) = shop.rejects()
    assert refusal.reason == "MODEL_NOT_READY"
    assert refusal.message == (
        "model sha256:aaaaaaaaaaaa still waits for memory on w1, which keeps what was loaded lately, "
        f"after {refusal.waited_s:.1f} s; try again"
    )


def test_a_refusal_for_now_is_tried_again_when_the_worker_says():
    shop = Shop()
    shop.worker()
    shop.want("a")
    shop.ended("w1", Verdict("MODEL_MEMORY_BUSY", "wait", {}, 10.0))
    shop.beat(9, "w1")
    assert len(shop.asked()) == 1
    shop.beat(2, "w1")
    assert shop.asked() == [("w1", MODEL)] * 2
    assert shop.refused() == []


def test_when_one_cannot_another_is_asked():
    shop = Shop()
    shop.worker("w1")
    shop.worker("w2")
    shop.want("a")
    (first,) = shop.asked()
    shop.ended(first[0], TOO_LARGE)
    assert {endpoint for endpoint, _ in shop.asked()} == {"w1", "w2"}
    assert shop.refused() == []


def test_what_nobody_can_load_is_refused_with_what_a_worker_said():
    shop = Shop()
    shop.worker()
    shop.want("a")
    shop.ended("w1", TOO_LARGE)
    (refusal,) = shop.rejects()
    assert refusal.message == (
        "no worker can load model sha256:aaaaaaaaaaaa: needs 9 GiB, the budget is 4 GiB"
    )
    assert refusal.reason == "MODEL_TOO_LARGE"
    assert refusal.metadata == {"model": MODEL, "needed_bytes": "9"}
    # Who comes now is told at once, and nobody is asked again.
    shop.beat(1, "w1")
    shop.want("b")
    assert shop.refused() == [("a", "MODEL_TOO_LARGE"), ("b", "MODEL_TOO_LARGE")]
    assert len(shop.asked()) == 1
    shop.beat(VERDICT_KEEP_S, "w1")
    shop.want("c")
    assert len(shop.asked()) == 2


def test_what_workers_said_is_forgotten_when_it_stands_no_longer():
    shop = Shop()
    residency = Residency(shop.scheduler._fleet, wants_max=2)
    want = residency.want(MODEL, GIB, 0.0)
    for number in range(100):
        want.endpoint = f"w{number}"
        residency.ended(want.endpoint, MODEL, busy_until(2.5), float(number))
    assert list(want.verdicts) == ["w97", "w98", "w99"]


def test_a_version_that_the_store_has_forgotten_is_not_waited_for_like_one_that_a_worker_has_not_got():
    shop = Shop()
    shop.worker()
    shop.want("a")
    shop.ended("w1", Verdict("MODEL_NOT_FOUND", "no version sha256:aaaa", {"model": MODEL}))
    (refusal,) = shop.rejects()
    assert refusal.reason == "MODEL_LOAD_FAILED"
    assert refusal.metadata == {"model": MODEL, "cause": "no version sha256:aaaa"}
    assert refusal.message == "no worker can load model sha256:aaaaaaaaaaaa: no version sha256:aaaa"


def test_a_want_that_made_room_for_others_does_not_look_on_beside_its_successor():
    shop = Shop(queues_max=1)
    shop.worker(on_demand=False)
    shop.end(shop.want("a"))
    residency = shop.scheduler._planner.residency
    first = residency.wants[MODEL]
    shop.end(shop.want("b", model=OTHER))
    shop.want("c")
    assert residency.wants[MODEL] is not first
    shop.wait(LOOK_S + 0.1)
    assert (first.timed, residency.wants[MODEL].timed) == (False, True)


def test_a_worker_that_died_with_the_load_is_replaced():
    shop = Shop()
    shop.worker("w1")
    shop.worker("w2")
    shop.want("a")
    ((gone, _),) = shop.asked()
    other = "w2" if gone == "w1" else "w1"
    shop.lose(gone)
    shop.ended(gone, Verdict("SERVICE_UNAVAILABLE", "gone", {}))
    assert shop.asked()[-1] == (other, MODEL)


def test_a_model_that_leaves_while_it_is_waited_for_is_asked_for_again():
    shop = Shop()
    shop.worker("w1", resident(MODEL, free_sequences=0))
    shop.want("a")
    assert shop.asked() == []
    shop.worker("w1", resident(MODEL, state=ModelState.DRAINING))
    shop.worker("w2")
    shop.wait(0.1)
    shop.beat(LOOK_S, "w2")
    assert shop.asked() == [("w2", MODEL)]


def test_an_answer_that_nobody_waits_for_is_ignored():
    shop = Shop()
    shop.worker()
    assert shop.ended("w1") == []
    shop.want("a")
    shop.ended("w9", TOO_LARGE)
    assert (len(shop.asked()), shop.refused()) == (1, [])


def test_a_load_goes_on_when_its_caller_left_and_is_not_asked_for_twice():
    shop = Shop()
    shop.worker()
    shop.end(shop.want("a"))
    shop.want("b")
    assert len(shop.asked()) == 1


def test_wants_are_forgotten():
    shop = Shop()
    shop.worker()
    shop.end(shop.want("a"))
    shop.ended("w1", TOO_LARGE)
    residency = shop.scheduler._planner.residency
    assert list(residency.wants) == [MODEL]
    shop.beat(VERDICT_KEEP_S + 1, "w1")
    assert residency.wants == {}
    assert shop.scheduler.next_wake() is not None


def test_the_cost_of_an_eviction_is_the_way_back():
    shop = Shop()
    shop.worker("w1", resident(memory=2 * GIB, idle=0.0, running=1), resident(THIRD, 2 * GIB, idle=300.0))
    worker = shop.scheduler._fleet.workers["w1"]
    small, large = (outlook_on(worker, size, frozenset()).cost_s for size in (GIB, 3 * GIB))
    again = BEGIN_S + 2 * GIB / 0.5e9
    assert small == pytest.approx(again * 0.3679, rel=1e-3)
    assert large == pytest.approx(again * 1.3679, rel=1e-3)


class Room:
    """One worker with memory for one of two models, as the worker keeps the rules: dwell, drain, load."""

    def __init__(self, shop, dwell, load_s):
        self.shop, self.dwell, self.load_s = shop, dwell, load_s
        self.model, self.ready_at, self.used_at = None, 0.0, 0.0
        self.loads = []
        self.loading = None

    def told(self):
        now = self.shop.now
        if self.model is None:
            return ()
        if now < self.ready_at:
            return (coming(model=self.model),)
        left = max(self.ready_at + self.dwell - now, 0.0)
        return (resident(self.model, 3 * GIB, dwell=left, idle=now - self.used_at),)

    def step(self, seconds):
        shop, before = self.shop, self.model
        for effect in shop.effects:
            if isinstance(effect, LoadModel) and self.model and shop.now < self.ready_at + self.dwell:
                left = self.ready_at + self.dwell - shop.now
                shop.ended("w1", Verdict("MODEL_MEMORY_BUSY", "", {}, left), effect.model)
            elif isinstance(effect, LoadModel):
                self.model = self.loading = effect.model
                self.ready_at = shop.now + self.load_s
                self.loads.append((shop.now, effect.model))
            elif isinstance(effect, Dispatch):
                # What was sent before the worker said that it evicts is still served: it drains.
                assert effect.request.model in (before, self.model)
                self.used_at = shop.now
                shop.end(effect.ticket)
        shop.effects = [each for each in shop.effects if not isinstance(each, (LoadModel, Dispatch))]
        if self.loading and shop.now >= self.ready_at:
            shop.ended("w1", None, self.loading)
            self.loading = None
        shop.worker("w1", *self.told())
        shop.wait(seconds)


def test_two_hot_models_with_room_for_one_take_turns_and_nobody_waits_longer_than_a_turn():
    dwell, load_s = 150.0, 5.0
    shop = Shop(hold_max_s=600.0, loading_hold_s=600.0)
    room = Room(shop, dwell, load_s)
    shop.worker("w1")
    arrived, waits = {}, []
    for number in range(int(1_200 / 0.1)):
        if number % 10 == 0:
            for model in (MODEL, OTHER):
                ticket = shop.want(f"{model[7]}{number}", model=model, size=2 * GIB)
                arrived[ticket] = shop.now
        for effect in shop.effects:
            if isinstance(effect, Dispatch):
                waits.append(shop.now - arrived.pop(effect.ticket))
        room.step(0.1)
    assert shop.rejects() == []
    for begin, _ in room.loads:
        for model in (MODEL, OTHER):
            near = [when for when, which in room.loads if which == model and begin <= when < begin + 300]
            assert len(near) <= 2
    assert len(room.loads) >= 6
    # The other one is loaded, stays as long as it must, and then this one is loaded.
    assert max(waits) <= load_s + dwell + load_s + 2 * LOOK_S


MODELS = [MODEL, OTHER, THIRD]
events = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.sampled_from(MODELS)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(
            st.just("report"),
            st.sampled_from(["w1", "w2"]),
            st.lists(
                st.tuples(st.sampled_from(MODELS), st.sampled_from(list(ModelState)), st.floats(0, 5)),
                max_size=2,
                unique_by=lambda each: each[0],
            ),
        ),
        st.tuples(st.just("lose"), st.sampled_from(["w1", "w2"])),
        st.tuples(
            st.just("end"),
            st.sampled_from(["w1", "w2"]),
            st.sampled_from(MODELS),
            st.sampled_from(["", "MODEL_TOO_LARGE", "MODEL_MEMORY_BUSY", "SERVICE_UNAVAILABLE"]),
        ),
        st.tuples(st.just("wait"), st.floats(0.01, 20)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(events)
def test_whatever_happens_a_model_is_asked_for_once_at_a_time_and_everybody_is_answered(history):
    shop = Shop(loading_hold_s=20.0, no_worker_hold_s=5.0)
    tickets, loading = {}, {}

    def look():
        for effect in shop.effects:
            if isinstance(effect, LoadModel):
                assert effect.model not in loading
                assert any(model == effect.model for model in tickets.values())
                loading[effect.model] = effect.endpoint
            elif hasattr(effect, "ticket") and effect.ticket in tickets:
                del tickets[effect.ticket]
        shop.effects.clear()

    for event in history:
        match event:
            case "arrive", model:
                tickets[shop._tickets + 1] = model
                shop.want(f"r{shop._tickets}", model=model)
            case "leave", number:
                if number in tickets:
                    del tickets[number]
                    shop.end(number)
            case "report", endpoint, models:
                told = [
                    resident(model, 2 * GIB, dwell=dwell, state=state, idle=1.0)
                    for model, state, dwell in models
                ]
                shop.worker(endpoint, *told)
            case "lose", endpoint:
                shop.scheduler.worker_found(endpoint)
                shop.lose(endpoint)
            case "end", endpoint, model, reason:
                if loading.get(model) == endpoint:
                    del loading[model]
                    shop.ended(endpoint, Verdict(reason, "no", {}, 0.5) if reason else None, model)
            case "wait", seconds:
                shop.wait(seconds)
        look()
    for model, endpoint in list(loading.items()):
        del loading[model]
        shop.ended(endpoint, TOO_LARGE, model)
        look()
    shop.wait(700)
    look()
    assert tickets == {}
    for model, endpoint in list(loading.items()):
        shop.ended(endpoint, TOO_LARGE, model)
    shop.wait(2 * VERDICT_KEEP_S)
    assert shop.scheduler._planner.residency.wants == {}
