"""The index of prefixes against sets: who holds what, and how far a prompt matches."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.batcher.core.prefixes import Prefixes

PREFIXES_MAX = 4
names = st.lists(st.integers(1, 6), max_size=5)


def matches(index, prompt):
    """By bit, how many names that worker holds from the first one on."""
    found = {}
    counts = []
    for bits, count in index.match(prompt):
        counts.append(count)
        for place in range(bits.bit_length()):
            if bits >> place & 1:
                assert 1 << place not in found
                found[1 << place] = count
    assert counts == sorted(set(counts)), "the longest match comes last"
    return found


class IndexMachine(RuleBasedStateMachine):
    """`known` has for each worker what it holds, the one noted first in front, and whether it said so."""

    def __init__(self):
        super().__init__()
        self.index = Prefixes(PREFIXES_MAX)
        self.known = {}
        self.tells = {}

    def holder(self, data):
        return data.draw(st.sampled_from(list(self.known)))

    def note(self, holder, name, told):
        known = self.known[holder]
        if name not in known and len(known) == PREFIXES_MAX:
            del known[next(iter(known))]
        known[name] = told

    @precondition(lambda self: len(self.known) < 4)
    @rule()
    def join(self):
        holder = self.index.join()
        assert holder.bit not in {other.bit for other in self.known}
        assert holder.bit.bit_length() <= 4, "bits of those who left are used again"
        self.known[holder], self.tells[holder] = {}, False

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data):
        holder = self.holder(data)
        self.index.leave(holder)
        del self.known[holder]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def clear(self, data):
        holder = self.holder(data)
        self.index.clear(holder)
        self.known[holder].clear()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), names=names)
    def expect(self, data, names):
        holder = self.holder(data)
        self.index.expect(holder, names)
        for name in names:
            if name not in self.known[holder]:
                self.note(holder, name, told=False)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), names=names)
    def stored(self, data, names):
        holder = self.holder(data)
        self.index.stored(holder, names)
        self.tells[holder] = True
        for name in names:
            self.note(holder, name, told=True)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), names=names)
    def evicted(self, data, names):
        holder = self.holder(data)
        self.index.evicted(holder, names)
        for name in names:
            self.known[holder].pop(name, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), names=names)
    def ended(self, data, names):
        holder = self.holder(data)
        self.index.ended(holder, names)
        for name in names:
            if self.tells[holder] and self.known[holder].get(name) is False:
                del self.known[holder][name]

    @rule(prompt=names)
    def match(self, prompt):
        expected = {}
        for holder, known in self.known.items():
            count = next((n for n, name in enumerate(prompt) if name not in known), len(prompt))
            if count:
                expected[holder.bit] = count
        assert matches(self.index, prompt) == expected

    @invariant()
    def nothing_else_is_kept(self):
        assert len(self.index) == len({name for known in self.known.values() for name in known})
        for holder, known in self.known.items():
            assert holder.known == known
            assert len(known) <= PREFIXES_MAX


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_matches_as_far_as_somebody_holds_all_its_names():
    index = Prefixes()
    short, long = index.join(), index.join()
    index.stored(short, [1, 2])
    index.stored(long, [1, 2, 3, 9])
    assert matches(index, [1, 2, 3, 4]) == {short.bit: 2, long.bit: 3}
    assert matches(index, [9]) == {long.bit: 1}
    assert matches(index, [7, 1]) == {}
    assert matches(index, []) == {}


def test_what_was_sent_is_expected_at_once_and_kept_when_the_worker_says_so():
    index = Prefixes()
    holder = index.join()
    index.stored(holder, [])
    index.expect(holder, [1, 2])
    index.stored(holder, [1])
    index.ended(holder, [1, 2])
    assert matches(index, [1, 2]) == {holder.bit: 1}


def test_a_worker_that_tells_nothing_is_believed_to_keep_what_it_was_sent():
    index = Prefixes()
    holder = index.join()
    index.expect(holder, [1, 2])
    index.ended(holder, [1, 2])
    assert matches(index, [1, 2]) == {holder.bit: 2}


def test_a_bit_that_is_used_again_brings_nothing_along():
    index = Prefixes()
    old = index.join()
    index.stored(old, [1, 2])
    index.leave(old)
    new = index.join()
    assert new.bit == old.bit
    assert matches(index, [1]) == {}
    assert len(index) == 0


def test_those_noted_longest_ago_are_forgotten_first():
    index = Prefixes(prefixes_max=3)
    holder, other = index.join(), index.join()
    index.stored(other, [1])
    index.stored(holder, [1, 2, 3, 4])
    assert list(holder.known) == [2, 3, 4]
    assert matches(index, [1]) == {other.bit: 1}
