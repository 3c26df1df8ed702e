"""What a sequence finds of its prompt, and when what it computed can be found."""

from services.worker.core.scheduler import Scheduler
from tests.unit.worker_core.made import limits, planned, sequence, step


def scheduler(*sequences, prefix_cache=True, **fields):
    sizes = {"total_blocks": 20, "context_length": 80, "step_tokens_max": 64}
    made = Scheduler(limits(**(sizes | fields)), prefix_cache=prefix_cache)
    for one in sequences:
        made.add(one, 0)
    return made


def run_alone(made, one):
    """Everything that a sequence computes, until it ends."""
    made.add(one, 0)
    seen = []
    while len(made):
        seen += planned(step(made)[0])
    return seen


def test_a_second_sequence_computes_only_what_is_new():
    made = scheduler()
    run_alone(made, sequence("a", 10, new=1))
    two = sequence("b", 14, new=1)
    assert run_alone(made, two) == [("b", 8, 6)]
    assert (two.cached, two.prefilled) == (8, 6)


def test_the_last_token_is_always_computed():
    made = scheduler()
    run_alone(made, sequence("a", 9, new=1))
    assert run_alone(made, sequence("b", 8, new=1)) == [("b", 4, 4)]
    assert run_alone(made, sequence("c", 9, new=1)) == [("c", 8, 1)]


def test_what_a_sequence_generated_is_found_by_the_next_turn():
    made = scheduler()
    one = sequence("a", 6, new=7)
    run_alone(made, one)
    two = sequence("b", 0, new=1)
    two.tokens = [*one.tokens, 1, 2, 3]
    two.prompt_tokens = len(two.tokens)
    assert run_alone(made, two) == [("b", 12, 4)]


def test_resumed_output_is_found_but_only_the_prompt_counts_as_cached():
    made = scheduler()
    run_alone(made, sequence("a", 16, new=1))
    two = sequence("b", 6, new=20, output=11)
    made.add(two, 0)
    assert planned(step(made)[0]) == [("b", 16, 1)]
    assert two.cached == 6


def test_another_root_finds_nothing():
    made = scheduler()
    run_alone(made, sequence("a", 10, new=1, prefix_root=b"one"))
    assert run_alone(made, sequence("b", 10, new=1, prefix_root=b"two")) == [("b", 0, 10)]
    assert run_alone(made, sequence("c", 10, new=1, prefix_root=b"one")) == [("c", 8, 2)]


def test_nothing_is_found_where_the_cache_is_off():
    made = scheduler(prefix_cache=False)
    run_alone(made, sequence("a", 10, new=1))
    assert run_alone(made, sequence("b", 10, new=1)) == [("b", 0, 10)]
    assert made.room().cached_blocks == 0


def test_a_block_is_found_only_after_its_step_was_settled():
    made = scheduler(sequence("a", 10))
    plan = made.plan(1)
    made.add(sequence("b", 10), 0)
    ahead = made.plan(2)
    assert planned(ahead) == [("a", 10, 1), ("b", 0, 10)]
    made.settle(plan, [7], 3)
    made.settle(ahead, [7, 7], 4)
    made.add(sequence("c", 10), 0)
    assert ("c", 8, 2) in planned(made.plan(5))


def test_a_cancelled_sequence_leaves_what_was_settled():
    made = scheduler(sequence("a", 30), step_tokens_max=10)
    step(made)
    made.plan(2)
    made.cancel("a")
    made.add(sequence("b", 30), 0)
    assert planned(made.plan(3)) == [("b", 8, 10)]


def test_shared_blocks_are_counted_once():
    made = scheduler(total_blocks=8, context_length=32)
    run_alone(made, sequence("seed", 17, new=1))
    for name in "abc":
        made.add(sequence(name, 17, new=9), 0)
    step(made)
    room = made.room()
    assert (room.running, room.free_blocks) == (3, 8 - 4 - 3)
    assert room.cached_blocks == 4


def test_a_found_block_that_was_free_is_missing_from_the_free_ones():
    made = scheduler(total_blocks=6, context_length=24, sequences_max=2)
    run_alone(made, sequence("seed", 9, new=1))
    other = sequence("other", 8, new=9)
    other.tokens = list(range(70, 78))
    made.add(other, 0)
    step(made)
    # Four blocks are free, two of them found: its own three and a spare one are needed.
    made.add(sequence("long", 17, new=2), 0)
    assert planned(step(made)[0]) == [("other", 8, 1)]


def test_a_preempted_sequence_finds_what_survived():
    made = scheduler(sequence("old", 11, new=5), total_blocks=7, context_length=28)
    new = sequence("new", 11, new=20)
    new.tokens = list(range(50, 61))
    made.add(new, 0)
    seen = []
    for _ in range(8):
        seen += [chunk for chunk in planned(step(made)[0]) if chunk[0] == "new"]
    assert new.preemptions == 1
    assert seen[:3] == [("new", 0, 11), ("new", 11, 1), ("new", 12, 1)]
    assert (new.prefilled, new.cached) == (11 + 1, 0)


def test_a_block_is_hashed_once(monkeypatch):
    from services.worker.core import prefix

    hashed = []
    real = prefix.blake2b
    monkeypatch.setattr(prefix, "blake2b", lambda data, digest_size: (
        hashed.append(data), real(data, digest_size=digest_size))[1])  # fmt: skip
    made = scheduler()
    run_alone(made, sequence("a", 20, new=21))
    assert len(hashed) == 40 // 4
    run_alone(made, sequence("b", 20, new=21))
    assert len(hashed) == 2 * (40 // 4)
