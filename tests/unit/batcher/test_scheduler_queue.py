"""Who waits, in which order, for how long, and with which words somebody is refused."""

import pytest

from services.batcher.core.lifecycle import IllegalTransition
from services.batcher.core.messages import ModelState
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report, request


def test_a_request_goes_at_once_to_a_worker_that_is_free():
    desk = Desk()
    desk.report("w1", free=1)
    desk.arrive(name="a")
    (dispatch,) = desk.dispatches()
    assert (dispatch.endpoint, dispatch.waited_s, dispatch.ticket) == ("w1", 0.0, 1)
    assert dispatch.lease_id.startswith("lease-")


def test_a_request_waits_until_a_worker_reports_room():
    desk = Desk()
    desk.report("w1", free=0)
    desk.arrive(name="a")
    assert desk.placed() == []
    desk.now += 0.1
    desk.report("w1", free=1)
    assert desk.placed() == [("a", "w1")]
    assert desk.dispatches()[0].waited_s == pytest.approx(0.1)


def test_requests_leave_in_order_of_first_arrival_not_of_entering_here():
    desk = Desk()
    desk.report(free=0)
    for name, arrival in (("late", 30), ("early", 10), ("middle", 20)):
        desk.arrive(name=name, arrival=arrival)
    desk.report(free=3)
    assert [name for name, _ in desk.placed()] == ["early", "middle", "late"]


def test_requests_of_one_millisecond_leave_in_order_of_entering():
    desk = Desk()
    desk.report(free=0)
    for name in "abc":
        desk.arrive(name=name, arrival=7)
    desk.report(free=3)
    assert [name for name, _ in desk.placed()] == ["a", "b", "c"]


def test_more_urgent_bands_leave_first_and_unspecified_is_standard():
    desk = Desk()
    desk.report(free=0)
    for name, priority in (
        ("batch", 3),
        ("unspecified", 0),
        ("standard", 2),
        ("interactive", 1),
        ("shed", 4),
    ):
        desk.arrive(name=name, priority=priority, arrival=5)
    desk.report(free=5)
    names = [name for name, _ in desk.placed()]
    assert names == ["interactive", "unspecified", "standard", "batch", "shed"]


def test_no_request_overtakes_a_head_that_needs_more_blocks():
    desk = Desk()
    desk.report(free=4, blocks=3)
    desk.arrive(name="big", arrival=1, prompt=160)
    desk.arrive(name="small", arrival=2, prompt=16)
    assert desk.placed() == []
    desk.report(free=4, blocks=20)
    assert [name for name, _ in desk.placed()] == ["big", "small"]


def test_when_the_head_leaves_the_next_one_is_placed_at_once():
    desk = Desk()
    desk.report(free=4, blocks=3)
    big = desk.arrive(name="big", arrival=1, prompt=160)
    desk.arrive(name="small", arrival=2, prompt=16)
    desk.end(big)
    assert [name for name, _ in desk.placed()] == ["small"]


def test_when_the_head_expires_the_next_one_is_placed_at_once():
    desk = Desk(report_stale_s=60.0)
    desk.report(free=4, blocks=3)
    desk.arrive(name="big", arrival=1, prompt=160, deadline=desk.now + 1)
    desk.arrive(name="small", arrival=2, prompt=16)
    desk.wait(1.5)
    assert desk.refused() == [("big", "DEADLINE_UNREACHABLE")]
    assert desk.placed() == [("small", "w1")]


def test_one_models_queue_does_not_hold_up_another():
    desk = Desk()
    desk.report("w1", report(model_report(0), model_report(1, model=OTHER)))
    desk.arrive(name="a", model=MODEL)
    desk.arrive(name="b", model=OTHER)
    assert desk.placed() == [("b", "w1")]


def test_an_expired_request_is_refused_at_arrival_even_with_a_free_worker():
    desk = Desk()
    desk.report(free=1)
    desk.arrive(name="a", deadline=desk.now)
    assert desk.placed() == []
    assert desk.refused() == [("a", "DEADLINE_UNREACHABLE")]
    assert "before the request came here" in desk.rejects()[0].message


def test_a_request_that_expires_while_held_is_never_dispatched():
    desk = Desk()
    desk.report(free=0)
    desk.arrive(name="a", deadline=desk.now + 0.1)
    desk.now += 0.1
    desk.report(free=1)
    assert desk.placed() == []
    assert desk.refused() == [("a", "DEADLINE_UNREACHABLE")]
    assert "after 0.100 s in the queue" in desk.rejects()[0].message


def test_the_timer_alone_refuses_an_expired_request():
    desk = Desk(report_stale_s=60.0)
    desk.report(free=0)
    desk.arrive(name="a", deadline=desk.now + 3)
    assert desk.scheduler.next_wake() == pytest.approx(desk.now + 3)
    desk.wait(3)
    assert desk.refused() == [("a", "DEADLINE_UNREACHABLE")]


def test_a_request_held_for_the_longest_time_is_refused_with_a_hint():
    desk = Desk(hold_max_s=2.0, report_stale_s=60.0)
    desk.report(free=0)
    desk.arrive(name="a")
    desk.wait(2)
    (reject,) = desk.rejects()
    assert (reject.reason, reject.metadata, reject.retry_after_s) == (
        "QUEUE_TIMEOUT",
        {"waited_ms": "2000"},
        1.0,
    )


def test_a_full_queue_refuses_with_its_limit_and_a_hint():
    desk = Desk(queue_depth_max=2)
    desk.report(free=0)
    for name in "abc":
        desk.arrive(name=name)
    (reject,) = desk.rejects()
    assert (reject.request.request_id, reject.reason) == ("c", "QUEUE_FULL")
    assert reject.metadata == {"queue": MODEL, "limit": "2"}
    assert reject.retry_after_s == 1.0
    assert desk.scheduler.waiting == 2


def test_the_hint_of_a_full_queue_follows_the_pace_at_which_it_empties():
    desk = Desk(queue_depth_max=10)
    desk.report(free=0)
    for number in range(60):
        desk.arrive(name=f"r{number}", arrival=number)
        if number >= 5:
            desk.now += 0.5
            desk.report("w1", report(model_report(1), active=[name for name, _ in desk.placed()]))
    while not desk.rejects():
        desk.arrive(name="more", arrival=99)
    assert 4.0 < desk.rejects()[0].retry_after_s <= 6.0


def test_prompt_tokens_bound_a_queue_but_one_request_may_always_wait():
    desk = Desk(queue_prompt_tokens_max=100)
    desk.report(free=0)
    desk.arrive(name="huge", prompt=5000)
    desk.arrive(name="more", prompt=1)
    assert desk.refused() == [("more", "QUEUE_FULL")]
    assert "prompt tokens" in desk.rejects()[0].message


def test_the_number_of_models_waited_for_is_bounded():
    desk = Desk(queues_max=1)
    desk.arrive(name="a", model=MODEL)
    desk.arrive(name="b", model=OTHER)
    assert desk.refused() == [("b", "QUEUE_FULL")]


def test_a_model_that_nobody_serves_is_refused_after_the_hold():
    desk = Desk(no_worker_hold_s=5.0)
    desk.arrive(name="a")
    desk.wait(4.9)
    assert desk.refused() == []
    desk.arrive(name="b")
    desk.wait(0.2)
    assert desk.refused() == [("a", "NO_CAPACITY")]
    assert desk.rejects()[0].metadata == {"model": MODEL}
    desk.wait(5)
    assert desk.refused() == [("a", "NO_CAPACITY"), ("b", "NO_CAPACITY")]


def test_the_hold_for_a_worker_begins_anew_when_the_last_one_is_lost():
    desk = Desk(no_worker_hold_s=5.0, report_stale_s=60.0)
    desk.report(free=0)
    desk.arrive(name="a")
    desk.wait(20)
    desk.lose()
    desk.wait(4.9)
    assert desk.refused() == []
    desk.wait(0.2)
    assert desk.refused() == [("a", "NO_CAPACITY")]


def test_a_model_that_is_being_loaded_is_waited_for():
    desk = Desk(no_worker_hold_s=1.0, report_stale_s=60.0)
    desk.report("w1", report(model_report(0, state=ModelState.LOADING, progress=0.5, total_blocks=0)))
    desk.arrive(name="a")
    desk.wait(10)
    assert desk.refused() == []
    place = desk.scheduler.place_of("a", desk.now)
    assert (place.endpoint, place.progress, place.position) == ("w1", 0.5, 0)
    desk.report("w1", report(model_report(1)))
    assert desk.placed() == [("a", "w1")]


def test_a_failed_load_is_named_in_the_refusal():
    desk = Desk(no_worker_hold_s=1.0, report_stale_s=60.0)
    desk.report("w1", report(model_report(0, state=ModelState.FAILED, error="digest mismatch")))
    desk.arrive(name="a")
    desk.wait(2)
    assert desk.refused() == [("a", "NO_CAPACITY")]
    assert "digest mismatch" in desk.rejects()[0].message


def test_a_prompt_that_no_worker_can_ever_hold_is_refused_and_does_not_block():
    desk = Desk()
    desk.report(free=0, blocks=0, total_blocks=10)
    desk.arrive(name="huge", prompt=145, arrival=1)
    desk.arrive(name="fits", prompt=144, arrival=2)
    assert desk.refused() == [("huge", "REQUEST_TOO_LARGE")]
    assert desk.rejects()[0].metadata == {"field": "prompt", "size": "145", "limit": "144"}
    desk.report(free=1, blocks=10, total_blocks=10)
    assert desk.placed() == [("fits", "w1")]


def test_draining_refuses_new_requests_and_still_places_those_held():
    desk = Desk()
    desk.report(free=0)
    desk.arrive(name="held")
    desk.scheduler.drain()
    desk.arrive(name="new")
    assert desk.refused() == [("new", "DRAINING")]
    assert desk.rejects()[0].retry_after_s == 0.1
    desk.report(free=1)
    assert desk.placed() == [("held", "w1")]


def test_closing_refuses_what_still_waits():
    desk = Desk()
    desk.report(free=1)
    desk.arrive(name="runs")
    desk.arrive(name="waits")
    desk.close()
    assert desk.refused() == [("waits", "DRAINING")]
    assert (desk.scheduler.waiting, desk.scheduler.leased) == (0, 1)


def test_a_caller_that_leaves_is_out_of_the_queue_at_once():
    desk = Desk(queue_depth_max=1)
    desk.report(free=0)
    ticket = desk.arrive(name="a")
    desk.end(ticket)
    assert desk.scheduler.waiting == 0
    desk.arrive(name="b")
    desk.report(free=2)
    assert desk.placed() == [("b", "w1")]
    assert desk.scheduler.snapshot(desk.now, 10).counters.cancelled == 1


def test_a_request_that_the_proxy_answered_by_itself_leaves_the_queue():
    desk = Desk()
    desk.report(free=0)
    ticket = desk.arrive(name="a")
    desk.answer(ticket)
    assert not desk.scheduler.holds(ticket)
    desk.report(free=1)
    assert desk.placed() == []


def test_positions_count_those_ahead_in_all_more_urgent_bands():
    desk = Desk()
    desk.report(free=0)
    for name, priority, arrival in (("c", 3, 1), ("a", 1, 9), ("b1", 2, 5), ("b0", 2, 4)):
        desk.arrive(name=name, priority=priority, arrival=arrival)
    positions = {name: desk.scheduler.place_of(name, desk.now).position for name in ("a", "b0", "b1", "c")}
    assert positions == {"a": 0, "b0": 1, "b1": 2, "c": 3}
    assert desk.scheduler.place_of("nobody", desk.now) is None


def test_a_resent_request_is_found_under_its_newest_stay():
    desk = Desk()
    desk.report(free=0)
    first = desk.arrive(name="a", arrival=1)
    second = desk.arrive(name="a", arrival=1)
    assert desk.scheduler.place_of("a", desk.now).ticket == second
    desk.end(first)
    assert desk.scheduler.place_of("a", desk.now).ticket == second
    desk.end(second)
    assert desk.scheduler.place_of("a", desk.now) is None


def test_a_ticket_cannot_be_used_twice_at_once():
    desk = Desk()
    desk.scheduler.request_arrived(1, request("a"), desk.now)
    with pytest.raises(ValueError, match="ticket 1"):
        desk.scheduler.request_arrived(1, request("b"), desk.now)


def test_response_headers_come_once():
    desk = Desk()
    desk.report(free=1)
    ticket = desk.arrive()
    desk.answer(ticket, "w1")
    with pytest.raises(IllegalTransition):
        desk.answer(ticket, "w1")
