"""The fast worker against one that walks every step, and what both keep."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.batcher.simulate.sequence import Happening, Sequence
from services.batcher.simulate.worker import Worker
from tests.unit.batcher_simulate.made import arrival, arrivals, prefix, small
from tests.unit.batcher_simulate.naive import NaiveWorker, drive


def land(worker, number, each):
    worker.land(Sequence(number, each.prompt_tokens, each.output_tokens, each.prefix), each.at)


def walk(made, profile, **options):
    """First-token times and ends of a fast worker, and the worker."""
    worker = Worker(profile, **options)
    first, ended = {}, {}
    for now, seen in drive(worker, made, land):
        for happening, sequence in seen:
            if happening is Happening.FIRST_TOKEN:
                first[sequence.number] = now
            else:
                assert sequence.number not in ended
                ended[sequence.number] = (now, sequence.cached, sequence.preemptions)
    return first, ended, worker


def naive(made, profile):
    worker = NaiveWorker(profile)
    for _ in drive(worker, made, lambda worker, number, each: worker.land(number, each, each.at)):
        pass
    return worker


def close(times):
    return pytest.approx(times, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(arrivals(), st.integers(2, 8), st.sampled_from([2304, 3072, 4096]))
def test_the_fast_worker_does_what_a_walk_over_every_step_does(made, sequences_max, kv_tokens):
    profile = small(sequences_max=sequences_max, kv_tokens=kv_tokens)
    first, ended, worker = walk(made, profile)
    oracle = naive(made, profile)
    assert first == close(oracle.first)
    assert {n: each[0] for n, each in ended.items()} == close(
        {n: each[0] for n, each in oracle.ended.items()}
    )
    assert {n: each[1:] for n, each in ended.items()} == {n: each[1:] for n, each in oracle.ended.items()}
    assert worker.kv.pages == len(oracle.cache)
    assert worker.kv.found(made[0].prefix, 9)[0] == sum(page in oracle.cache for page in made[0].prefix)


@settings(max_examples=80, deadline=None)
@given(arrivals(), st.lists(st.floats(0, 4), max_size=10))
def test_looking_at_a_worker_changes_nothing(made, looks):
    first, ended, _ = walk(made, small())
    worker = Worker(small())
    seen_first, seen_ended = {}, {}
    pending = sorted(
        [(each.at, 0, number) for number, each in enumerate(made)] + [(at, 1, 0) for at in looks]
    )
    while pending or worker.due < inf:
        if pending and pending[0][0] <= worker.due:
            at, kind, number = pending.pop(0)
            if kind:
                worker.observe(at)
            else:
                land(worker, number, made[number])
            continue
        now = worker.due
        for happening, sequence in worker.step_ended():
            times = seen_first if happening is Happening.FIRST_TOKEN else seen_ended
            times[sequence.number] = now
    assert seen_first == close(first)
    assert seen_ended == close({n: each[0] for n, each in ended.items()})


@settings(max_examples=100, deadline=None)
@given(arrivals(count=20))
def test_everything_is_given_back_and_counted(made):
    first, ended, worker = walk(made, small(kv_tokens=2560))
    assert set(first) == set(ended) == set(range(len(made)))
    assert all(first[number] <= ended[number][0] for number in ended)
    assert worker.kv.free == worker.kv.total_blocks
    assert worker.generated_tokens == sum(each.output_tokens for each in made)
    assert worker.prompt_tokens == sum(each.prompt_tokens for each in made)
    assert worker.promised_blocks == worker.prefill_left == worker.running == 0


def test_a_lone_request_takes_what_the_law_says():
    profile = small()
    first, ended, _ = walk([arrival(prompt=600, output=3)], profile)
    chunks = [(256, 0), (256, 256), (88, 512)]
    prompt_s = sum(profile.step_s(n, 0, n * (before + n / 2), 1) for n, before in chunks)
    assert first[0] == close(prompt_s)
    assert ended[0][0] == close(prompt_s + profile.step_s(1, 601, 0, 1) + profile.step_s(1, 602, 0, 1))


def test_the_second_prompt_finds_the_blocks_of_the_first():
    made = [arrival(at, 1100, 5, [7, 8]) for at in (0.0, 1.0)]
    _, ended, worker = walk(made, small())
    assert [ended[number][1] for number in (0, 1)] == [0, 1024]
    assert worker.hit_tokens == 1024


def test_the_last_token_of_a_prompt_is_always_computed():
    made = [arrival(at, 1024, 5, [7, 8]) for at in (0.0, 1.0)]
    assert walk(made, small())[1][1][1] == 512


def test_the_newest_is_thrown_out_when_blocks_run_out_and_still_ends():
    made = [arrival(at, 1000, 300) for at in (0.0, 0.001)]
    first, ended, _ = walk(made, small(kv_tokens=2304))
    assert [ended[number][2] for number in (0, 1)] == [0, 1]
    assert ended[0][0] < ended[1][0]
    assert first[1] < ended[0][0]


def test_an_arrival_waits_for_the_step_that_runs_and_not_for_the_stretch():
    profile = small()
    late = arrival(0.5, 10, 1)
    first, _, _ = walk([arrival(0.0, 10, 1000), late], profile)
    assert first[1] - late.at < 3 * profile.step_s(11, 1000, 0, 2)


def test_a_prompt_that_never_fits_is_an_error():
    with pytest.raises(ValueError, match="never fits"):
        land(Worker(small()), 0, arrival(prompt=5000))


def test_pages_of_a_shared_prefix_are_held_once():
    made = [arrival(0.0, 600, 400, [1]), arrival(0.2, 600, 400, [1])]
    worker = Worker(small())
    for _ in drive(worker, made, land):
        if worker.running == 2 and not worker.prefilling:
            break
    own = worker.kv.total_blocks - worker.kv.free - 32
    assert worker.kv.found(prefix(1), 1) == (1, 0)
    assert own <= 2 * (-(-(600 + 400) // 16) - 32)
