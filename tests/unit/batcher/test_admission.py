"""Who may wait: bounds of queue, band and tenant, shedding, deadlines that cannot be met, holds."""

import pytest

from services.batcher.core.messages import ModelState
from services.batcher.core.refusals import RETRY_MAX_S, RETRY_NO_WORKER_S, RETRY_UNKNOWN_S
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report

BOUNDS = [
    ({"queue_depth_max": 10}, {}, "requests waiting"),
    ({"queue_prompt_tokens_max": 160}, {"prompt": 16}, "prompt tokens waiting"),
    ({"queue_bytes_max": 1000}, {"size_bytes": 100}, "bytes waiting"),
]


def busy(**limits):
    desk = Desk(report_stale_s=1e6, **limits)
    desk.report("w1", free=0)
    return desk


@pytest.mark.parametrize(("bound", "fields", "what"), BOUNDS)
def test_a_queue_takes_what_its_bound_says(bound, fields, what):
    desk = busy(**bound)
    for number in range(11):
        desk.arrive(name=f"r{number}", tenant=f"t{number}", **fields)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("r10", "QUEUE_FULL")
    assert reject.metadata == {"queue": MODEL, "limit": str(next(iter(bound.values())))}
    assert what in reject.message
    assert reject.retry_after_s == RETRY_UNKNOWN_S


@pytest.mark.parametrize(("bound", "fields", "what"), BOUNDS)
def test_a_tenant_takes_its_share_and_the_others_still_have_theirs(bound, fields, what):
    desk = busy(tenant_share=0.3, **bound)
    for number in range(4):
        desk.arrive(name=f"a{number}", tenant="a", priority=1 + number, **fields)
    desk.arrive(name="b", tenant="b", **fields)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("a3", "TENANT_OVER_SHARE")
    limit = str(int(next(iter(bound.values())) * 0.3))
    assert reject.metadata == {"tenant": "a", "limit": limit}
    assert what in reject.message
    assert desk.scheduler.waiting == 4


@pytest.mark.parametrize(("bound", "fields", "what"), BOUNDS)
def test_a_band_takes_its_share_and_more_urgent_ones_still_have_theirs(bound, fields, what):
    desk = busy(band_shares=(1.0, 1.0, 1.0, 0.5), **bound)
    for number in range(6):
        desk.arrive(name=f"r{number}", priority=4, **fields)
    desk.arrive(name="standard", **fields)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("r5", "QUEUE_FULL")
    assert "band sheddable" in reject.message
    assert what in reject.message
    assert desk.scheduler.waiting == 6


def test_one_request_may_always_wait_in_a_band_and_for_a_tenant():
    desk = busy(
        queue_prompt_tokens_max=100, queue_bytes_max=100, tenant_share=0.1, band_shares=(0.1, 0.1, 0.1, 0.1)
    )
    desk.arrive(prompt=5000, size_bytes=5000)
    assert desk.rejects() == []


def test_the_first_of_a_tenant_is_still_bounded_by_the_queue():
    desk = busy(queue_prompt_tokens_max=100, tenant_share=0.5)
    desk.arrive(name="a", prompt=60, tenant="a")
    desk.arrive(name="b", prompt=60, tenant="b")
    assert desk.refused() == [("b", "QUEUE_FULL")]


def test_room_is_free_again_when_somebody_goes():
    desk = busy(queue_bytes_max=100)
    first = desk.arrive(name="a", size_bytes=80)
    desk.end(first)
    desk.arrive(name="b", size_bytes=80)
    desk.report("w1", free=1)
    desk.arrive(name="c", size_bytes=80)
    assert desk.rejects() == []


# Shedding.


def test_a_full_queue_drops_the_newest_of_the_least_urgent_band_for_a_more_urgent_one():
    desk = busy(queue_depth_max=4)
    for name, priority in (("batch", 3), ("shed old", 4), ("shed new", 4), ("standard", 2)):
        desk.arrive(name=name, priority=priority)
    desk.arrive(name="interactive", priority=1)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("shed new", "SHED")
    assert reject.metadata == {"priority": "sheddable"}
    assert reject.retry_after_s == RETRY_UNKNOWN_S
    assert desk.scheduler.waiting == 4


def test_the_tenant_with_most_requests_in_the_band_is_dropped_first():
    desk = busy(queue_depth_max=4)
    for name, tenant in (("a1", "a"), ("a2", "a"), ("b", "b"), ("c", "c")):
        desk.arrive(name=name, tenant=tenant, priority=4)
    desk.arrive(name="urgent", priority=1)
    assert desk.refused() == [("a2", "SHED")]


def test_as_many_are_dropped_as_one_large_request_needs():
    desk = busy(queue_prompt_tokens_max=100)
    for number in range(5):
        desk.arrive(name=f"r{number}", priority=4, prompt=20)
    desk.arrive(name="urgent", priority=2, prompt=50)
    assert desk.refused() == [("r4", "SHED"), ("r3", "SHED"), ("r2", "SHED")]
    assert desk.scheduler.waiting == 3


def test_nobody_is_dropped_when_that_would_not_make_room():
    desk = busy(queue_prompt_tokens_max=100)
    desk.arrive(name="urgent", priority=1, prompt=85)
    desk.arrive(name="sheddable", priority=4, prompt=10)
    desk.arrive(name="new", priority=2, prompt=50)
    assert desk.refused() == [("new", "QUEUE_FULL")]


def test_equals_are_not_dropped_for_each_other():
    desk = busy(queue_depth_max=1)
    desk.arrive(name="first", priority=4)
    desk.arrive(name="second", priority=4)
    assert desk.refused() == [("second", "QUEUE_FULL")]


def test_a_promoted_request_is_dropped_as_one_of_its_new_band():
    desk = busy(queue_depth_max=2, age_promote_s=5.0)
    desk.arrive(name="old", priority=4)
    desk.wait(10.0)
    desk.arrive(name="young", priority=3)
    desk.arrive(name="standard", priority=2)
    desk.arrive(name="another", priority=2)
    assert desk.refused() == [("young", "SHED"), ("another", "QUEUE_FULL")]


# Deadlines.


def paced(gap_s=0.5):
    """A queue that 20 wait in, and from which one goes every `gap_s`."""
    desk = Desk(report_stale_s=1e6)
    desk.report("w1", free=0)
    for number in range(40):
        desk.arrive(name=f"r{number}", arrival=number)
    for _ in range(20):
        desk.now += gap_s
        desk.report("w1", report(model_report(1), active=[name for name, _ in desk.placed()]))
    return desk


def test_a_deadline_before_its_turn_is_refused_at_once_with_the_estimate():
    desk = paced()
    desk.arrive(name="soon", arrival=99, deadline=desk.now + 5, deadline_unix_ms=1 << 50)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("soon", "DEADLINE_UNREACHABLE")
    assert int(reject.metadata["estimate_ms"]) == pytest.approx(20 * 500, rel=0.1)
    assert 5.0 < reject.retry_after_s <= RETRY_MAX_S
    assert "expected in" in reject.message


def test_a_deadline_after_its_turn_is_not_refused():
    desk = paced()
    desk.arrive(name="later", arrival=99, deadline=desk.now + 15, deadline_unix_ms=1 << 50)
    assert desk.rejects() == []


def test_an_earlier_deadline_than_those_of_its_tenant_is_not_behind_them():
    desk = paced()
    desk.arrive(name="soon", arrival=99, deadline=desk.now + 5)
    assert desk.rejects() == []


def test_another_tenant_is_not_refused_for_the_queue_of_the_first():
    desk = paced()
    desk.arrive(name="soon", tenant="other", arrival=99, deadline=desk.now + 5, deadline_unix_ms=1 << 50)
    assert desk.rejects() == []


def test_a_more_urgent_request_is_not_refused_for_those_below():
    desk = paced()
    desk.arrive(name="soon", priority=1, arrival=99, deadline=desk.now + 5, deadline_unix_ms=1 << 50)
    assert desk.rejects() == []


def test_without_a_pace_nobody_is_refused_for_the_queue():
    desk = busy()
    for number in range(50):
        desk.arrive(name=f"r{number}")
    desk.arrive(name="soon", deadline=desk.now + 0.5)
    assert desk.rejects() == []


def learned(seconds_a_token=0.001):
    """A worker whose prompts were seen to take so long; nobody waits."""
    desk = Desk(report_stale_s=1e6)
    desk.report("w1", free=8)
    for number in range(5):
        ticket = desk.arrive(name=f"first {number}", prompt=2000)
        desk.now += 2000 * seconds_a_token
        desk.answer(ticket, "w1")
        desk.end(ticket)
    return desk


def test_a_deadline_before_its_own_prompt_is_computed_is_refused_even_when_nobody_waits():
    desk = learned()
    desk.arrive(name="long", prompt=8000, deadline=desk.now + 5)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("long", "DEADLINE_UNREACHABLE")
    assert int(reject.metadata["estimate_ms"]) == pytest.approx(8000, rel=0.1)


def test_a_prompt_that_is_quick_enough_is_not_refused():
    desk = learned()
    desk.arrive(name="short", prompt=3000, deadline=desk.now + 5)
    assert desk.rejects() == []


def test_a_call_that_the_proxy_moved_says_nothing_about_how_long_prompts_take():
    desk = learned()
    ticket = desk.arrive(name="moved", prompt=2000)
    desk.now += 500.0
    desk.answer(ticket, "w9")
    desk.end(ticket)
    desk.arrive(name="short", prompt=3000, deadline=desk.now + 5)
    assert desk.rejects() == []


# Holds.


def loading(desk, progress=0.25, state=ModelState.LOADING):
    desk.report("w1", report(model_report(0, state=state, progress=progress, total_blocks=0)))


def test_a_model_that_loads_for_too_long_is_refused_with_its_progress():
    desk = Desk(loading_hold_s=30.0, no_worker_hold_s=5.0, report_stale_s=1e6)
    loading(desk)
    desk.arrive(name="a")
    desk.wait(29.5)
    assert desk.refused() == []
    desk.wait(1.0)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("a", "MODEL_NOT_READY")
    assert "25% on w1" in reject.message
    assert reject.metadata == {"model": MODEL}
    assert reject.retry_after_s == RETRY_NO_WORKER_S


def test_each_request_waits_for_a_loading_model_for_its_own_time():
    desk = Desk(loading_hold_s=30.0, report_stale_s=1e6)
    loading(desk)
    desk.arrive(name="a")
    desk.wait(20.0)
    desk.arrive(name="b")
    desk.wait(15.0)
    assert desk.refused() == [("a", "MODEL_NOT_READY")]
    desk.report("w1", report(model_report(1)))
    assert desk.placed() == [("b", "w1")]


def test_the_hold_for_loading_begins_anew_when_the_last_worker_that_served_is_lost():
    desk = Desk(loading_hold_s=30.0, no_worker_hold_s=5.0, report_stale_s=1e6, hold_max_s=600.0)
    desk.report("w2", free=0)
    loading(desk)
    desk.arrive(name="a")
    desk.wait(40.0)
    assert desk.refused() == []
    desk.lose("w2")
    desk.wait(29.5)
    assert desk.refused() == []
    desk.wait(1.0)
    assert desk.refused() == [("a", "MODEL_NOT_READY")]


def test_when_loading_fails_only_the_short_hold_is_left():
    desk = Desk(loading_hold_s=30.0, no_worker_hold_s=5.0, report_stale_s=1e6)
    loading(desk)
    desk.arrive(name="a")
    desk.wait(10.0)
    loading(desk, state=ModelState.FAILED)
    desk.wait(5.5)
    assert desk.refused() == [("a", "NO_CAPACITY")]


def test_another_model_that_is_ready_is_no_reason_to_wait_longer():
    desk = Desk(loading_hold_s=30.0, no_worker_hold_s=5.0, report_stale_s=1e6)
    desk.report("w1", report(model_report(1, model=OTHER)))
    desk.arrive(name="a")
    desk.wait(5.5)
    assert desk.refused() == [("a", "NO_CAPACITY")]
