"""What the pool says about prefixes that others know, and what can really be found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.blocks import BlockPool
from services.worker.core.changes import NetChanges
from services.worker.core.prefix import root, wire_stride
from services.worker.core.scheduler import Scheduler
from tests.unit.worker_core.made import limits, sequence, step
from tests.unit.worker_core.world import World, arrivals, bounds
from tokenloom.contract import prefix

STRIDE = 2


def chain_of(pool, tokens):
    """Blocks and keys of a chain of one block for each token, held once."""
    blocks, content, keys = pool.take(len(tokens)), root(b""), []
    for block, token in zip(blocks, tokens, strict=True):
        content = pool.note(block, content.then([token]))
        keys.append(content.key)
    return blocks, keys


def known(pool, stride):
    """By looking at every block: the keys at multiples of `stride` that a prompt can find."""
    contents = [pool._contents[block] for block in pool._found.values()]
    return {content.key for content in contents if content.depth % stride == 0}


class Receiver:
    """Puts together what it was told."""

    def __init__(self):
        self.keys = set()

    def take(self, changes):
        stored, evicted = map(set, changes)
        assert len(stored) + len(evicted) == sum(map(len, changes)), "a key is told once"
        assert not stored & self.keys
        assert evicted <= self.keys
        self.keys = (self.keys | stored) - evicted


def test_only_the_ends_of_whole_strides_are_told():
    pool = BlockPool(8, stride=STRIDE)
    _, keys = chain_of(pool, [1, 2, 3, 4, 5])
    assert pool.take_changes() == ([keys[1], keys[3]], [])
    assert pool.take_changes() == ([], [])


def test_an_eviction_is_told_and_a_return_too():
    pool = BlockPool(4, stride=STRIDE)
    blocks, keys = chain_of(pool, [1, 2, 3, 4])
    pool.take_changes()
    pool.release(blocks)
    (taken,) = pool.take(1)
    assert pool.take_changes() == ([], [keys[3]])
    pool.release([taken])
    pool.release(pool.take(4))
    assert pool.take_changes() == ([], [keys[1]])
    chain_of(pool, [1, 2])
    assert pool.take_changes() == ([keys[1]], [])


def test_what_came_and_went_between_two_looks_is_not_told():
    pool = BlockPool(2, stride=STRIDE)
    pool.release(chain_of(pool, [1, 2])[0])
    pool.release(pool.take(2))
    assert pool.take_changes() == ([], [])


def test_a_copy_that_takes_the_place_of_an_evicted_block_is_told():
    pool = BlockPool(4, stride=STRIDE)
    one, keys = chain_of(pool, [1, 2])
    copy, _ = chain_of(pool, [1, 2])
    pool.release(one)
    other = pool.take(2)
    pool.take_changes()
    assert known(pool, STRIDE) == set()
    pool.release(copy)
    assert pool.take_changes() == ([keys[1]], [])
    pool.release(other)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_net_changes_are_the_difference_of_the_sets(moves):
    changes, now, before = NetChanges(), set(), set()
    for key, look in moves:
        if key in now:
            now.remove(key)
            changes.lose(key)
        else:
            now.add(key)
            changes.gain(key)
        if look:
            assert (set(changes.gained()), set(changes.lost())) == (now - before, before - now)
            assert bool(changes) == (now != before)
            changes.clear()
            before = set(now)


@settings(max_examples=60, deadline=None)
@given(bounds(), st.lists(arrivals, max_size=12), st.integers(1, 2), st.integers(1, 3))
def test_what_is_told_is_what_can_be_found(bound, coming, depth, stride):
    world = World(Scheduler(bound), depth=depth)
    pool = world.scheduler._pool = BlockPool(bound.total_blocks, stride=stride)
    receiver, told = Receiver(), []
    real = world.step

    def look(number):
        real(number)
        if number % 3 == 0:
            receiver.take(world.scheduler.prefix_changes())
            assert receiver.keys == known(pool, stride)
            told.append(len(receiver.keys))

    world.step = look
    world.drain(coming)
    receiver.take(world.scheduler.prefix_changes())
    assert receiver.keys == known(pool, stride)
    assert max(told, default=0) <= bound.total_blocks // stride


@settings(max_examples=60, deadline=None)
@given(bounds(), st.lists(arrivals, max_size=12), st.integers(1, 2))
def test_the_beginning_of_what_can_be_found_can_be_found_or_is_held_as_a_copy(bound, coming, depth):
    world = World(Scheduler(bound), depth=depth)
    pool, check = world.scheduler._pool, world.check_blocks

    def look():
        check()
        held = {content.key for block, content in pool._contents.items() if pool.references(block)}
        for block in pool._found.values():
            content = pool._contents[block].parent
            while content.depth:
                assert content.key in pool._found or content.key in held
                content = content.parent

    world.check_blocks = look
    world.drain(coming)


@pytest.mark.parametrize("block_tokens", [1, 8, 15, 32, 512])
def test_blocks_of_another_size_have_no_names_that_others_know(block_tokens):
    assert wire_stride(block_tokens) == 0
    made = Scheduler(limits(block_tokens=block_tokens, context_length=8 * block_tokens))
    made.add(sequence("a", 5 * block_tokens, new=1), 0)
    while len(made):
        step(made)
    assert made.room().cached_blocks > 0
    assert made.prefix_changes() == ([], [])


@pytest.mark.parametrize(("cache", "prompt", "names"), [(True, 1100, 2), (True, 511, 0), (False, 1100, 0)])
def test_the_scheduler_names_prefixes_as_the_gateway_does(cache, prompt, names):
    made = Scheduler(
        limits(total_blocks=128, block_tokens=16, context_length=2048, step_tokens_max=512),
        prefix_cache=cache,
    )
    one = sequence("a", prompt, new=1, prefix_root=prefix.root_hash("sha256:0", "salt"))
    ids = list(one.tokens)
    made.add(one, 0)
    while len(made):
        step(made)
    stored, evicted = made.prefix_changes()
    wire = prefix.wire_hashes(prefix.block_hashes(ids, one.prefix_root))
    assert (prefix.numbers(stored), evicted) == (wire[:names], [])
    assert len(stored) == names
