"""Shares in turn and by session: how close, how sticky, and what moves when weights change."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.core.canaries import Canaries, Rotation, Target, sticky

WEIGHTS = st.lists(st.integers(1, 12) | st.integers(1, 2**32 - 1), min_size=2, max_size=12)
ONE_LARGE, THREE_LARGE = [100] + [1] * 39, [30, 30, 30, 1, 1, 1]
TEN_PERCENT = (Target("old", 90), Target("new", 10))


def targets(weights):
    return [Target(f"sha256:{number}", weight) for number, weight in enumerate(weights)]


def given_by(canaries, count, of=TEN_PERCENT, alias="m@stable", key=""):
    """The digests of `count` requests in a row."""
    digests = []
    for _ in range(count):
        turn = canaries.turn(alias, of, key)
        turn.take()
        digests.append(turn.target.digest)
    return digests


@given(WEIGHTS, st.binary(max_size=8), st.integers(1, 300), st.integers(0, 200))
@example(ONE_LARGE, b"", 70, 0)
@example(ONE_LARGE, b"", 40, 69)
def test_any_requests_in_a_row_give_each_target_its_share_within_the_bound(weights, place, count, before):
    rotation, total = Rotation(targets(weights), place), sum(weights)
    bound = 2 - Fraction(1, len(weights) - 1)
    got = Counter()
    for number in range(before + count):
        index = rotation.next()
        rotation.give(index)
        if number >= before:
            got[index] += 1
    for index, weight in enumerate(weights):
        assert abs(got[index] - Fraction(count * weight, total)) <= bound


@given(WEIGHTS, st.binary(max_size=8))
@example(ONE_LARGE, b"")
@example(THREE_LARGE, b"")
def test_no_target_is_ever_owed_a_whole_request_nor_has_it_one_too_many(weights, place):
    rotation, total = Rotation(targets(weights), place), sum(weights)
    bound = total * (1 - Fraction(1, 2 * len(weights) - 2))
    for _ in range(150):
        assert max(map(abs, rotation._owed)) <= bound
        assert sum(rotation._owed) == 0
        rotation.give(rotation.next())


@pytest.mark.parametrize("weights", [(90, 10), (9, 1), (900_001, 99_999), (2**32 - 1, 477_218_588)])
@pytest.mark.parametrize("replica", [b"a", b"b", b"c"])
def test_a_canary_at_ten_percent_gets_a_hundred_of_a_thousand(weights, replica):
    canaries = Canaries(10, replica)
    digests = given_by(canaries, 1500, targets(weights))
    for begin in range(0, 500, 7):
        assert abs(digests[begin : begin + 1000].count("sha256:1") - 100) <= 1


def test_the_rotations_of_two_targets_begin_at_every_place_alike():
    begins = Counter(
        given_by(Canaries(1, b"%d" % number), 10).index("new") for number in range(4000)
    )  # fmt: skip
    assert set(begins) == set(range(10))
    assert max(begins.values()) < 500


def test_what_replicas_give_first_averages_out():
    first = Counter(given_by(Canaries(1, b"%d" % number), 1)[0] for number in range(2000))
    assert 160 <= first["new"] <= 240
    three = [Target("a", 6), Target("b", 3), Target("c", 1)]
    first = Counter(given_by(Canaries(1, b"%d" % number), 1, three)[0] for number in range(2000))
    assert set(first) == {"a", "b", "c"}


def test_a_turn_that_is_not_taken_is_the_next_ones():
    canaries = Canaries(10, b"")
    asked = {canaries.turn("m@stable", TEN_PERCENT, "").target.digest for _ in range(50)}
    assert len(asked) == 1
    assert abs(given_by(canaries, 1000).count("new") - 100) <= 1


def test_equal_targets_of_a_later_catalogue_do_not_begin_again():
    one, other = Canaries(10, b"x"), Canaries(10, b"x")
    plain = given_by(one, 40)
    again = [given_by(other, 1, [Target(t.digest, t.weight) for t in TEN_PERCENT])[0] for _ in range(40)]
    assert again == plain


def test_changed_targets_begin_again_with_the_new_shares():
    canaries = Canaries(10, b"x")
    given_by(canaries, 7)
    assert abs(given_by(canaries, 100, [Target("old", 50), Target("new", 50)]).count("new") - 50) <= 1


def test_aliases_do_not_take_each_others_turns():
    canaries = Canaries(10, b"x")
    got = {"m@stable": [], "n@stable": []}
    for _ in range(100):
        for alias, digests in got.items():
            digests += given_by(canaries, 1, alias=alias)
    assert [digests.count("new") for digests in got.values()] == [10, 10]


def test_turns_of_a_bounded_number_of_aliases_are_kept_and_the_others_still_get_their_share():
    canaries = Canaries(2, b"x")
    got = Counter()
    for number in range(3000):
        got[given_by(canaries, 1, alias=f"m{number % 3}@stable")[0]] += 1
        assert len(canaries) <= 2
    assert 230 <= got["new"] <= 370


def test_one_target_needs_no_turn():
    canaries = Canaries(10, b"")
    assert given_by(canaries, 3, [Target("only", 5)]) == ["only"] * 3
    assert len(canaries) == 0


@given(WEIGHTS, st.text(min_size=1, max_size=20), st.binary(), st.binary())
def test_a_session_gets_the_same_version_from_every_replica_and_takes_no_turn(weights, key, one, other):
    first, second = Canaries(10, one), Canaries(10, other)
    got = given_by(first, 3, targets(weights), key=key) + given_by(second, 1, targets(weights), key=key)
    assert len(set(got)) == 1
    assert len(first) == len(second) == 0


def test_a_session_may_be_any_text():
    assert sticky("m@stable", TEN_PERCENT, "\ud800\0") in TEN_PERCENT


def test_sessions_are_shared_out_by_weight():
    three = targets([6, 3, 1])
    got = Counter(sticky("m@stable", three, f"user-{number}").digest for number in range(10_000))
    assert [round(got[t.digest] / 1000, 1) for t in three] == pytest.approx([6, 3, 1], abs=0.2)


def test_sessions_of_one_alias_say_nothing_of_those_of_another():
    keys = [f"user-{number}" for number in range(2000)]
    one = {key for key in keys if sticky("m@stable", TEN_PERCENT, key).digest == "new"}
    other = {key for key in keys if sticky("n@stable", TEN_PERCENT, key).digest == "new"}
    assert len(one & other) < 50


@given(st.data(), WEIGHTS, st.text(min_size=1, max_size=8))
def test_a_session_moves_only_to_a_target_whose_weight_grew_against_that_of_the_one_it_leaves(
    data, weights, key
):
    changed = data.draw(
        st.lists(st.integers(1, 2**32 - 1), min_size=len(weights), max_size=len(weights))
    )  # fmt: skip
    before, after = targets(weights), targets(changed)
    left = before.index(sticky("m@a", before, key))
    came = after.index(sticky("m@a", after, key))
    assert changed[came] * weights[left] >= changed[left] * weights[came]


def test_a_canary_that_grows_moves_only_the_sessions_that_it_gains():
    keys = [f"user-{number}" for number in range(4000)]
    before = {key: sticky("m@stable", TEN_PERCENT, key).digest for key in keys}
    grown = [Target("old", 75), Target("new", 25)]
    moved = [(before[key], sticky("m@stable", grown, key).digest) for key in keys]
    assert ("new", "old") not in moved
    assert moved.count(("old", "new")) == pytest.approx(0.15 * len(keys), rel=0.15)


def test_a_target_that_goes_moves_only_its_own_sessions():
    three = targets([5, 3, 2])
    for number in range(500):
        before = sticky("m@a", three, f"{number}")
        if before != three[2]:
            assert sticky("m@a", three[:2], f"{number}") == before


def test_the_choice_of_a_session_is_the_same_in_every_release():
    three = targets([6, 3, 1])
    chosen = "".join(sticky("m@stable", three, f"user-{n}").digest[-1] for n in range(40))
    assert chosen == "0010210200200012021002022011100021121111"
