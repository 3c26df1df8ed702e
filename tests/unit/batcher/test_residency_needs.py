"""What a model takes of a worker's memory: learned from what workers say, bounded, told to who waits."""

import pytest

from services.batcher.core.messages import Verdict
from services.batcher.core.residency import LOOK_S, Residency
from tests.unit.batcher.shop import GIB, THIRD, TOO_LARGE, Shop, busy_until, coming, resident
from tests.unit.batcher.words import MODEL, OTHER


def full_and_idle(shop, seconds):
    """Time passes; w1 has 2 GiB free and keeps the rest, w2 would have to evict something idle."""
    for _ in range(round(seconds / 0.1)):
        shop.worker("w1", resident(memory=2 * GIB, dwell=1_000.0))
        shop.worker("w2", resident(THIRD, memory=3 * GIB))
        shop.wait(0.1)


def test_after_a_refusal_in_figures_a_worker_is_chosen_by_what_the_model_really_takes():
    shop = Shop()
    full_and_idle(shop, 0.1)
    shop.want("a")
    # By its weights it fits there.
    assert shop.asked() == [("w1", MODEL)]
    shop.ended("w1", busy_until(1.0))
    assert shop.asked()[1:] == [("w2", MODEL)]
    shop.ended("w2", Verdict("SERVICE_UNAVAILABLE", "", {}, 1.0))
    full_and_idle(shop, 1.0 + 2 * LOOK_S)
    assert shop.asked()[2:] == [("w2", MODEL)]


def test_what_a_model_took_where_it_was_loaded_counts_on_other_workers_too():
    shop = Shop()
    shop.worker("w0")
    ticket = shop.want("a")
    shop.worker("w0", coming()._replace(memory_bytes=3 * GIB))
    shop.ended("w0")
    shop.end(ticket)
    shop.lose("w0")
    full_and_idle(shop, 3 * LOOK_S)
    shop.want("b")
    assert shop.asked()[1:] == [("w2", MODEL)]


def test_needs_are_remembered_of_a_bounded_number_of_models_and_of_the_workers_there_are():
    shop = Shop()
    for endpoint in ("w1", "w2"):
        shop.worker(endpoint)
    residency = Residency(shop.scheduler._fleet, wants_max=2)
    for number, model in enumerate((MODEL, OTHER, THIRD)):
        for endpoint in ("w1", "w2", "gone"):
            residency.want(model, GIB, shop.now).endpoint = endpoint
            residency.ended(endpoint, model, busy_until(1.0, needed=number + 1), shop.now)
    assert residency._needs == {OTHER: {"w1": 2, "w2": 2}, THIRD: {"w1": 3, "w2": 3}}
    shop.scheduler.worker_removed("w1", shop.now)
    residency.want(THIRD, GIB, shop.now).endpoint = "w2"
    residency.ended("w2", THIRD, busy_until(1.0, needed=4), shop.now)
    assert residency._needs[THIRD] == {"w2": 4}


@pytest.mark.parametrize("said", ["", "many", "-1", "9" * 30])
def test_figures_that_cannot_be_read_teach_nothing(said):
    shop = Shop()
    shop.worker()
    shop.want("a")
    shop.ended("w1", Verdict("MODEL_MEMORY_BUSY", "", {"needed_bytes": said}, 1.0))
    assert shop.scheduler._planner.residency._needs == {}


def test_who_can_never_hold_a_model_is_asked_at_once_however_long_others_stay_there():
    shop = Shop()
    busy = resident(memory=3 * GIB, dwell=1_000.0)
    shop.worker("w1", busy)
    shop.want("a", size=4 * GIB)
    assert shop.asked() == [("w1", MODEL)]
    shop.ended("w1", TOO_LARGE)
    assert shop.refused() == [("a", "MODEL_TOO_LARGE")]


def test_who_waits_for_memory_in_vain_is_refused_with_the_workers_figures():
    shop = Shop(loading_hold_s=30.0, hold_max_s=600.0)
    shop.worker("w1", resident(memory=2 * GIB, dwell=0.0))
    shop.want("a")
    busy = resident(memory=2 * GIB, dwell=50.0)
    shop.ended("w1", busy_until(50.0))
    shop.beat(31, "w1", models=[busy])
    (refusal,) = shop.rejects()
    assert refusal.reason == "MODEL_MEMORY_BUSY"
    assert refusal.metadata == {"model": MODEL, **busy_until(0).metadata}
    left_s = 50.0 - refusal.waited_s
    assert refusal.retry_after_s == pytest.approx(left_s)
    assert refusal.message == (
        f"model sha256:aaaaaaaaaaaa still waits for memory on w1 after {refusal.waited_s:.1f} s: it needs "
        f"{3 * GIB} bytes, {2 * GIB} are free of {4 * GIB}; what is there may not leave for another "
        f"{left_s:.1f} s, try again then"
    )


def test_who_waits_for_a_worker_that_cannot_load_now_is_not_told_of_memory():
    shop = Shop(loading_hold_s=30.0, hold_max_s=600.0)
    shop.worker("w1")
    shop.want("a")
    shop.ended("w1", Verdict("SERVICE_UNAVAILABLE", "the modelstore is away", {}, 100.0))
    shop.beat(31, "w1")
    (refusal,) = shop.rejects()
    assert refusal.reason == "MODEL_NOT_READY"
    assert refusal.message == (
        "model sha256:aaaaaaaaaaaa could not be loaded on w1 yet (the modelstore is away) "
        f"after {refusal.waited_s:.1f} s; try again"
    )
