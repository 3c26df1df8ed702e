"""A plan may be made before the one before it is settled."""

import pytest

from services.worker.core.scheduler import PLANS_MAX
from services.worker.core.sequence import Finish, State
from tests.unit.worker_core.made import planned, sequence, step
from tests.unit.worker_core.test_scheduler import scheduler


def test_a_decode_feeds_on_the_token_that_the_plan_before_draws():
    made = scheduler(sequence("cut", 9), sequence("a", 3), step_tokens_max=11)
    first = made.plan(1)
    second = made.plan(2)
    assert [(chunk.sequence.id, chunk.start, chunk.feeds_from) for chunk in second.chunks] == [
        ("cut", 9, 0),
        ("a", 2, -1),
    ]
    made.settle(first, [70], 3)
    third = made.plan(4)
    assert [(chunk.sequence.id, chunk.start, chunk.feeds_from) for chunk in third.chunks] == [
        ("cut", 10, 0),
        ("a", 3, 1),
    ]
    assert [advance.token for advance in made.settle(second, [71, 80], 5)] == [71, 80]


def test_no_more_than_plans_max_are_outstanding():
    made = scheduler(sequence("a", 3))
    for number in range(PLANS_MAX):
        made.plan(number)
    with pytest.raises(ValueError, match="not settled"):
        made.plan(3)


def test_plans_are_settled_in_their_order():
    made = scheduler(sequence("a", 3))
    first, second = made.plan(1), made.plan(2)
    with pytest.raises(ValueError, match="oldest"):
        made.settle(second, [5], 3)
    made.settle(first, [5], 3)
    with pytest.raises(ValueError, match="oldest"):
        made.settle(first, [], 3)


def test_a_sequence_that_is_sure_to_end_is_not_planned_again():
    made = scheduler(sequence("a", 3, new=1), sequence("b", 31, new=9), step_tokens_max=64)
    made.plan(1)
    assert not made.plan(2)


def test_a_row_after_the_end_is_ignored_and_its_blocks_stay_until_it_is_computed():
    made = scheduler(sequence("a", 3, stop_token_ids=frozenset({9})), sequence("b", 3))
    first, second = made.plan(1), made.plan(2)
    made.settle(first, [9, 10], 3)
    assert made.room().free_blocks == 8 - 1
    assert made._pool.free == 8 - 2
    assert [advance.sequence.id for advance in made.settle(second, [11, 12], 4)] == ["b"]
    assert made._pool.free == 8 - 1


def test_blocks_of_one_who_leaves_stay_until_the_last_plan_that_writes_to_them():
    made = scheduler(sequence("a", 3), sequence("b", 3))
    first, second = made.plan(1), made.plan(2)
    made.cancel("a")
    made.settle(first, [5, 5], 3)
    assert made._pool.free == 8 - 2
    made.settle(second, [5, 5], 3)
    assert made._pool.free == 8 - 1


def test_abandoning_the_later_plan_leaves_the_earlier_one_its_blocks():
    made = scheduler(sequence("a", 3), sequence("b", 3))
    first, second = made.plan(1), made.plan(2)
    made.cancel("a")
    made.abandon(second)
    assert made._pool.free == 8 - 2
    made.settle(first, [5, 5], 3)
    assert made._pool.free == 8 - 1
    assert planned(made.plan(4)) == [("b", 3, 1)]


def preempted_in_flight():
    """`new` lost its blocks while a plan that draws for it was not settled."""
    old, new = sequence("old", 11, new=20), sequence("new", 11, new=20, stop_token_ids=frozenset({9}))
    made = scheduler(old, new, total_blocks=7, context_length=28, step_tokens_max=64)
    first = made.plan(1)
    made.settle(first, [5, 6], 1)
    second = made.plan(2)
    assert planned(second) == [("old", 11, 1), ("new", 11, 1)]
    return made, new, second


def test_the_token_of_one_preempted_meanwhile_counts_and_may_be_its_last():
    for token, finish in ((8, None), (9, Finish.STOP)):
        made, new, second = preempted_in_flight()
        assert planned(made.plan(3)) == [("old", 12, 1)]
        assert (new.state, new.in_flight, made._pool.free) == (State.WAITING, 1, 0)
        advances = made.settle(second, [7, token], 4)
        assert [(advance.token, advance.finish) for advance in advances] == [(7, None), (token, finish)]
        assert len(made) == (2 if finish is None else 1)


def test_one_preempted_meanwhile_does_not_return_before_that_plan_is_settled():
    low, urgent = sequence("low", 11, new=20, priority=3), sequence("urgent", 21, priority=1)
    urgent.tokens = list(range(60, 81))
    made = scheduler(low, total_blocks=10, context_length=40)
    step(made)
    made.add(urgent, 0)
    step(made)
    made._pressure.tokens = 1
    while len(low.tokens) < 16:
        assert planned(step(made)[0]) == [("low", len(low.tokens) - 2, 1)]
    plan = made.plan(1)
    made.abandon(made.plan(2))
    made.cancel("urgent")
    assert (low.state, low.planned, made._pool.free) == (State.WAITING, 1, 6)
    assert not made.plan(3)
    made.settle(plan, [7], 4)
    assert made.plan(5)


def test_one_who_cannot_run_alone_and_token_by_token_is_given_up():
    made = scheduler(sequence("big", 9), sequence("small", 3))
    for _ in range(40):
        plan = made.plan(1)
        gone = made.out_of_memory(plan)
        if gone is not None:
            break
        assert len(made) == 2
    assert gone is not None
    assert gone.id == "big"
    assert (gone.state, plan.tokens, len(made)) == (State.CANCELLED, 1, 1)
    assert planned(made.plan(2)) == [("small", 0, 1)]
