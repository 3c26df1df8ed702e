"""Blocks are handed out once, counted, and come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.blocks import BlockPool, blocks_for


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_are_rounded_up(tokens, blocks):
    assert blocks_for(tokens, 16) == blocks


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_taken_blocks_are_distinct_and_referenced_once():
    pool = BlockPool(5)
    taken = pool.take(3) + pool.take(2)
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert [pool.references(block) for block in taken] == [1] * 5
    assert pool.free == 0


def test_more_than_is_free_cannot_be_taken():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 are free"):
        pool.take(3)
    assert pool.free == 2


def test_a_shared_block_is_free_only_after_its_last_holder_left():
    pool = BlockPool(1)
    held = pool.take(1)
    pool.share(held)
    pool.release(held)
    assert pool.free == 0
    pool.release(held)
    assert pool.free == 1


def test_a_free_block_can_be_neither_shared_nor_released():
    pool = BlockPool(2)
    held = pool.take(1)
    pool.release(held)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(held)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(held)


def test_the_block_released_last_is_taken_first():
    pool = BlockPool(8)
    held = pool.take(3)
    pool.release(held)
    assert pool.take(3) == held


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60))
def test_holders_never_overlap_and_everything_comes_back(moves):
    pool, holders = BlockPool(16), []
    for count, give_back in moves:
        if give_back and holders:
            pool.release(holders.pop(count % len(holders)))
        elif count <= pool.free:
            holders.append(pool.take(count))
        held = [block for holder in holders for block in holder]
        assert len(held) == len(set(held))
        assert pool.free == 16 - len(held)
    for holder in holders:
        pool.release(holder)
    assert pool.free == 16
