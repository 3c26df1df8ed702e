"""Blocks are handed out once, counted, and come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.blocks import BlockPool, blocks_for
from services.worker.core.prefix import Content, root


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


def noted(pool, tokens):
    """A chain of one block for each token, held once; blocks and contents."""
    blocks, contents = pool.take(len(tokens)), [root(b"")]
    for block, token in zip(blocks, tokens, strict=True):
        contents.append(pool.note(block, contents[-1].then([token])))
    return blocks, contents[1:]


def test_a_released_block_is_found_until_it_is_handed_out_again():
    pool = BlockPool(3)
    blocks, contents = noted(pool, [5, 6])
    pool.release(blocks)
    assert (pool.free, pool.findable) == (3, 2)
    assert [pool.find(content) for content in contents] == list(zip(blocks, contents, strict=True))
    pool.take(3)
    assert [pool.find(content) for content in contents] == [None, None]
    assert pool.findable == 0


def test_unknown_blocks_are_taken_first_and_then_the_ends_of_the_oldest_chains():
    pool = BlockPool(6)
    old, _ = noted(pool, [1, 2])
    new, _ = noted(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    blank = pool.take(2)
    assert not set(blank) & {*old, *new}
    assert pool.take(4) == [old[1], old[0], new[1], new[0]]


def test_a_block_that_is_found_again_is_young_again():
    pool = BlockPool(2)
    first, _ = noted(pool, [1])
    second, _ = noted(pool, [2])
    pool.release(first)
    pool.release(second)
    pool.share(first)
    assert pool.free == 1
    pool.release(first)
    assert pool.take(2) == [second[0], first[0]]


def test_of_two_copies_one_is_kept_and_using_the_other_keeps_it_young():
    pool = BlockPool(4)
    one, contents = noted(pool, [1])
    other, _ = noted(pool, [2])
    copy, same = noted(pool, [1])
    assert same == contents, "chains continue on the object that is known already"
    pool.release(one)
    pool.release(other)
    pool.release(copy)
    assert pool.findable == 2
    assert pool.take(4)[2:] == [other[0], one[0]]


def test_a_copy_takes_the_place_of_one_that_was_evicted():
    pool = BlockPool(2)
    one, (content,) = noted(pool, [1])
    copy, _ = noted(pool, [1])
    pool.release(one)
    pool.take(1)
    assert pool.find(content) is None
    pool.release(copy)
    found = pool.find(content)
    assert found is not None
    assert found[0] == copy[0]


def test_a_copy_forgets_its_content_when_it_is_released():
    pool = BlockPool(2)
    one, (content,) = noted(pool, [1])
    copy, _ = noted(pool, [1])
    pool.release(one)
    pool.release(copy)
    assert pool.take(2) == [copy[0], one[0]]
    pool.release(copy)
    assert pool.find(content) is None


def test_what_only_shares_a_key_is_neither_found_nor_continued():
    pool = BlockPool(3)
    _, (real,) = noted(pool, [1])
    forged = Content(real.key, b"\2\0\0\0", real.parent)
    assert pool.find(forged) is None
    (block,) = pool.take(1)
    assert pool.note(block, forged) is forged
    pool.release([block])
    assert pool.find(forged) is None
    assert pool.find(real) is not None
