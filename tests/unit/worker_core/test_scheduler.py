"""What a step holds: decodes, chunks, arrivals, and who makes way when blocks run out."""

import pytest

from services.worker.core.plan import Limits, Verdict
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Finish, State
from tests.unit.worker_core.made import limits, planned, sequence, step


def scheduler(*sequences, **fields):
    made = Scheduler(limits(**fields))
    for one in sequences:
        assert made.add(one, 0) is Verdict.ACCEPTED
    return made


def test_an_empty_engine_plans_nothing():
    plan, advances = step(scheduler())
    assert not plan
    assert advances == []


def test_prompts_fill_the_step_and_the_last_is_cut():
    made = scheduler(sequence("a", 6), sequence("b", 12), step_tokens_max=10)
    plan, advances = step(made)
    assert planned(plan) == [("a", 0, 6), ("b", 0, 4)]
    assert plan.tokens == 10
    assert [(advance.sequence.id, advance.index) for advance in advances] == [("a", 0)]


def test_decodes_come_before_chunks():
    made = scheduler(sequence("a", 6), sequence("b", 12), step_tokens_max=10)
    step(made)
    plan, _ = step(made)
    assert planned(plan) == [("a", 6, 1), ("b", 4, 8)]
    assert plan.decodes == 1
    plan, _ = step(made)
    assert planned(plan) == [("a", 7, 1), ("b", 12, 1)]
    assert plan.decodes == 2


def test_a_chunk_draws_only_when_it_reaches_the_last_token():
    made = scheduler(sequence("a", 12), step_tokens_max=5)
    drawn = [len(step(made)[1]) for _ in range(4)]
    assert drawn == [0, 0, 1, 1]


def test_sequences_max_bounds_those_that_run():
    made = scheduler(*(sequence(name, 2, new=1) for name in "abcdef"))
    assert len(step(made)[0].chunks) == 4
    assert [name for name, _, _ in planned(step(made)[0])] == ["e", "f"]


def test_an_arrival_waits_for_blocks_for_its_prompt_and_a_spare_one():
    made = scheduler(sequence("a", 20), sequence("b", 12), total_blocks=8, step_tokens_max=64)
    assert planned(step(made)[0]) == [("a", 0, 20)]
    assert made.room().free_blocks == 0
    made.cancel("a")
    assert planned(step(made)[0]) == [("b", 8, 4)]


def test_alone_a_prompt_may_take_every_block():
    made = scheduler(sequence("a", 31), step_tokens_max=64)
    _, advances = step(made)
    assert advances[0].finish is Finish.LENGTH


def test_nobody_overtakes_the_first_that_waits():
    made = scheduler(sequence("big", 20), sequence("huge", 20), sequence("small", 1), step_tokens_max=64)
    assert [name for name, _, _ in planned(step(made)[0])] == ["big"]


def test_the_more_urgent_one_goes_first():
    made = scheduler(sequence("late", 4, priority=3), sequence("soon", 4, priority=1), sequences_max=1)
    assert [name for name, _, _ in planned(step(made)[0])] == ["soon"]


def test_the_newest_makes_way_when_blocks_run_out():
    made = scheduler(sequence("old", 11, new=20), sequence("new", 11, new=20), total_blocks=7,
                     context_length=28, step_tokens_max=64)  # fmt: skip
    old, new = (chunk.sequence for chunk in step(made)[0].chunks)
    for _ in range(2):
        step(made)
    assert (old.state, new.state) == (State.RUNNING, State.WAITING)
    assert (new.preemptions, new.computed, new.blocks) == (1, 0, [])
    assert len(new.tokens) == 13, "what was drawn stays"


def test_the_least_urgent_makes_way_even_when_it_is_older():
    made = scheduler(sequence("idle", 11, new=20, priority=3), total_blocks=7, context_length=28,
                     step_tokens_max=64)  # fmt: skip
    plan, _ = step(made)
    made.add(sequence("urgent", 8, new=20, priority=1), 0)
    for _ in range(6):
        step(made)
    assert plan.chunks[0].sequence.preemptions == 1


def test_a_preempted_sequence_is_computed_again_from_its_start():
    made = Scheduler(limits(total_blocks=7, context_length=28, step_tokens_max=64), prefix_cache=False)
    made.add(sequence("old", 11, new=3), 0)
    made.add(sequence("new", 11, new=20), 0)
    seen = []
    for _ in range(5):
        plan, _ = step(made)
        seen += [chunk for chunk in planned(plan) if chunk[0] == "new"]
    assert seen == [("new", 0, 11), ("new", 11, 1), ("new", 0, 13), ("new", 13, 1)]


def test_resumed_output_is_prefilled_and_continued():
    made = scheduler(sequence("a", 3, new=4, output=2))
    plan, advances = step(made)
    assert planned(plan) == [("a", 0, 5)]
    assert [advance.index for advance in advances] == [2]
    assert [advance.finish for advance in step(made)[1]] == [Finish.LENGTH]


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (sequence("x", 0), Verdict.EMPTY),
        (sequence("x", 32), Verdict.TOO_LONG),
        (sequence("x", 20, output=14, new=50), Verdict.TOO_LONG),
        (sequence("x", 20, output=12, new=50), Verdict.COMPLETE),
        (sequence("x", 20, output=3, new=3), Verdict.COMPLETE),
        (sequence("a", 2), Verdict.DUPLICATE),
    ],
)
def test_what_cannot_run_is_not_queued(one, verdict):
    made = scheduler(sequence("a", 2))
    assert made.add(one, 0) is verdict
    assert len(made) == 1


def test_the_queue_has_an_end():
    made = scheduler(sequence("a", 2), sequence("b", 2), waiting_max=2)
    assert made.add(sequence("c", 2), 0) is Verdict.FULL
    step(made)
    assert made.add(sequence("c", 2), 0) is Verdict.ACCEPTED


def test_cancelling_frees_blocks_before_the_next_step():
    made = scheduler(sequence("a", 9), sequence("b", 2))
    step(made)
    assert made.room().free_blocks == 4
    made.cancel("a")
    assert made.room().free_blocks == 7
    assert planned(step(made)[0]) == [("b", 2, 1)]
    assert made.cancel("a") is None


def test_one_cancelled_between_plan_and_settle_is_passed_over():
    made = scheduler(sequence("a", 2), sequence("b", 2))
    plan = made.plan(1)
    made.cancel("a")
    assert [advance.sequence.id for advance in made.settle(plan, [5, 6], 1)] == ["b"]


def test_a_plan_that_was_not_computed_can_be_made_again():
    made = scheduler(
        sequence("a", 6), sequence("b", 40), step_tokens_max=10, total_blocks=20, context_length=80
    )
    first = made.plan(1)
    made.abandon(first)
    again = made.plan(2)
    assert planned(again) == planned(first) == [("a", 0, 6), ("b", 0, 4)]
    with pytest.raises(ValueError, match="settled already"):
        made.abandon(first)
    assert [advance.index for advance in made.settle(again, [5], 3)] == [0]


def test_room_counts_what_those_waiting_will_take():
    made = scheduler(sequence("a", 8), sequence("b", 5), sequences_max=2)
    room = made.room()
    assert (room.running, room.waiting, room.free_sequences) == (0, 2, 0)
    assert room.free_blocks == 8 - (2 + 1) - (2 + 1)
    assert room.queued_prefill_tokens == 13
    step(made)
    assert made.room().queued_prefill_tokens == 0


def test_times_and_counts_are_kept():
    made = Scheduler(limits(step_tokens_max=4))
    one = sequence("a", 6, new=2)
    made.add(one, 100)
    for now_ns in (200, 300, 400):
        step(made, now_ns=now_ns)
    assert (one.arrived_ns, one.started_ns, one.first_token_ns) == (100, 200, 300)
    assert (one.steps, one.prefilled) == (3, 6)


def test_limits_that_could_deadlock_are_refused():
    with pytest.raises(ValueError, match="step_tokens_max"):
        limits(step_tokens_max=3)
    with pytest.raises(ValueError, match="context_length"):
        Limits(total_blocks=2, block_tokens=4, sequences_max=1, step_tokens_max=1, context_length=9)
