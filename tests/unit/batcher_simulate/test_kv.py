"""Blocks and pages of one worker."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.batcher.simulate.kv import KvCache
from tests.unit.batcher_simulate.made import prefix

PAGE_BLOCKS = 32
TOTAL = 6 * PAGE_BLOCKS


def held(kv, pages):
    """A sequence that computed these pages in blocks of its own."""
    kv.take(len(pages) * PAGE_BLOCKS)
    for page in pages:
        kv.keep(page)


def test_a_page_stays_findable_until_its_blocks_are_needed():
    kv, pages = KvCache(TOTAL, 16), prefix(1, 2)
    held(kv, pages)
    kv.let_go(pages)
    assert kv.free == TOTAL
    assert kv.found(pages, 9) == (2, 2 * PAGE_BLOCKS)
    kv.take(5 * PAGE_BLOCKS)
    assert kv.found(pages, 9) == (1, PAGE_BLOCKS)
    kv.take(PAGE_BLOCKS)
    assert kv.found(pages, 9) == (0, 0)


def test_the_longest_idle_page_leaves_first_and_the_end_of_a_prefix_before_its_beginning():
    kv, old, new = KvCache(TOTAL, 16), prefix(1, 2), prefix(3, 4)
    for pages in (old, new):
        held(kv, pages)
        kv.let_go(pages)
    kv.take(3 * PAGE_BLOCKS)
    assert (kv.found(old, 9)[0], kv.found(new, 9)[0]) == (1, 2)
    kv.take(2 * PAGE_BLOCKS)
    assert (kv.found(old, 9)[0], kv.found(new, 9)[0]) == (0, 1)


def test_a_page_that_another_sequence_computed_too_is_held_once():
    kv, pages = KvCache(TOTAL, 16), prefix(1)
    held(kv, pages)
    held(kv, pages)
    assert kv.free == TOTAL - PAGE_BLOCKS


def test_changes_are_told_once_and_what_came_and_went_is_gone():
    kv, one, two = KvCache(TOTAL, 16), prefix(1), prefix(2)
    held(kv, one)
    assert kv.changes() == (one, ())
    assert kv.changes() == ((), ())
    held(kv, two)
    kv.let_go((*one, *two))
    kv.take(TOTAL)
    came, went = kv.changes()
    assert came == ()
    assert set(went) == {*one, *two}


def test_a_page_of_no_whole_number_of_blocks_is_an_error():
    with pytest.raises(ValueError, match="whole number"):
        KvCache(10, 24)


class Kv(RuleBasedStateMachine):
    """Sequences come with a prefix, compute what is not found, and go, in any order."""

    def __init__(self):
        super().__init__()
        self.kv = KvCache(TOTAL, 16)
        self.sequences = []
        self.known = set()

    @rule(blocks=st.lists(st.integers(0, 1), max_size=3), own=st.integers(0, 20))
    def come(self, blocks, own):
        pages = prefix(*blocks)
        found, idle = self.kv.found(pages, len(pages))
        wanted = (len(pages) - found) * PAGE_BLOCKS + own
        if wanted + idle > self.kv.free:
            return
        self.kv.share(pages[:found])
        self.kv.take(wanted)
        for page in pages[found:]:
            self.kv.keep(page)
        self.sequences.append((pages, own))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def go(self, data):
        pages, own = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.kv.give_back(own)
        self.kv.let_go(pages)

    @invariant()
    def blocks_in_use_are_those_of_the_sequences_here(self):
        pages = {page for held, _ in self.sequences for page in held}
        used = len(pages) * PAGE_BLOCKS + sum(own for _, own in self.sequences)
        assert self.kv.free == TOTAL - used
        assert self.kv.pages * PAGE_BLOCKS + sum(own for _, own in self.sequences) <= TOTAL

    @invariant()
    def who_is_here_finds_its_prefix_and_reports_say_what_can_be_found(self):
        came, went = self.kv.changes()
        self.known = (self.known | set(came)) - set(went)
        assert len(self.known) == self.kv.pages
        for pages, _ in self.sequences:
            assert self.kv.found(pages, 9)[0] == len(pages)
            assert set(pages) <= self.known


Kv.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestKv = Kv.TestCase
