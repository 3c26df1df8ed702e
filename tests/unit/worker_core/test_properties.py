"""Whatever arrives and leaves: it drains, every block comes back, and each reads only what is its own."""

from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.core import prefix
from services.worker.core.scheduler import Scheduler
from tests.unit.worker_core.made import limits
from tests.unit.worker_core.world import STEPS_MAX, Arrival, World, arrivals, bounds, wanted

crowds = st.lists(arrivals, max_size=14)
depths = st.sampled_from([1, 2])


def check_drains(world, coming):
    world.drain(coming)
    world.check_empty()
    for name, drawn in world.drawn.items():
        whole = wanted(coming[int(name)], world.scheduler.limits.context_length)
        assert drawn == (whole if name in world.finished else whole[: len(drawn)])


@settings(max_examples=300, deadline=None)
@given(bounds(), crowds, depths, st.booleans())
def test_any_pattern_drains_and_gives_each_sequence_its_own_tokens(bound, coming, depth, cache):
    check_drains(World(Scheduler(bound, prefix_cache=cache), depth), coming)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bounds(), crowds, depths)
def test_keys_that_collide_never_let_a_sequence_read_what_is_not_its_own(monkeypatch, bound, coming, depth):
    def two_keys(data, digest_size):
        return blake2b(bytes([blake2b(data).digest()[0] & 1]), digest_size=digest_size)

    with monkeypatch.context() as patched:
        patched.setattr(prefix, "blake2b", two_keys)
        check_drains(World(Scheduler(bound), depth), coming)


@settings(max_examples=100, deadline=None)
@given(bounds(), st.lists(arrivals, min_size=2, max_size=10))
def test_the_first_in_rank_advances_in_every_step(bound, coming):
    world = World(Scheduler(bound))
    for index, arrival in enumerate(coming):
        world.arrive(str(index), arrival)
    for number in range(STEPS_MAX):
        if not world.alive:
            break
        first = min(world.alive.values(), key=lambda one: one.rank)
        before = (first.computed, first.preemptions)
        world.step(number)
        gone = first.id not in world.alive
        assert gone or (first.computed > before[0] and first.preemptions == before[1])


@settings(max_examples=200, deadline=None)
@given(bounds(), st.lists(arrivals, max_size=10), depths, st.sets(st.integers(0, 60)))
def test_steps_that_run_out_of_memory_lose_nobody_who_fits_alone(bound, coming, depth, failing):
    world = World(Scheduler(bound), depth)
    for index, arrival in enumerate(coming):
        world.arrive(str(index), arrival)
    for number in range(STEPS_MAX):
        while len(world.plans) < depth and world.plan(number):
            pass
        if not world.plans:
            break
        alone = len(world.plans[0][0].chunks) == 1 and world.plans[0][0].tokens == 1
        if number in failing and not alone:
            world.fail()
        else:
            world.settle(number)
    world.check_empty()
    assert not world.failed
    assert world.finished == set(world.drawn)
    for name, drawn in world.drawn.items():
        assert drawn == wanted(coming[int(name)], bound.context_length)


@pytest.mark.parametrize("depth", [1, 2])
def test_waves_of_one_prompt_share_its_blocks(depth):
    """The properties above are about something: blocks are found, and tokens fed before they are known."""
    world = World(Scheduler(limits(total_blocks=40, context_length=100, step_tokens_max=200)), depth)
    for wave in range(3):
        for number in range(3):
            world.arrive(f"{wave}{number}", Arrival(1, 41, 0, 6, 2, 0, None, 99, b""))
        while world.alive or world.plans:
            world.step(1)
    assert [one.cached for one in world.families] == [0, 0, 0, *[40] * 6]
    assert world.fed == (0 if depth == 1 else 9 * 5)
