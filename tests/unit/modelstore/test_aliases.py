"""Alias records: the highest number wins, and only what is well-formed counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.aliases import (
    TARGETS_MAX,
    WEIGHT_MAX,
    AliasKey,
    AliasState,
    Target,
    check_targets,
    folder,
    heads,
    parse_path,
    parse_record,
    record_bytes,
)

A, B = (f"sha256:{digit * 64}" for digit in "ab")
KEY = AliasKey("smollm2", "stable", 7)


def test_a_record_survives_storing():
    targets = (Target(A, 9), Target(B, 1))
    assert parse_record(record_bytes(targets, 123), KEY) == AliasState("stable", 7, targets, 123)


def test_a_record_of_before_changes_had_times_is_read():
    assert parse_record(b'{"targets":[]}', KEY) == AliasState("stable", 7, ())


def test_a_record_without_targets_takes_the_alias_away():
    assert parse_record(record_bytes((), 5), KEY) == AliasState("stable", 7, (), 5)


def test_two_equal_changes_are_two_records():
    targets = (Target(A),)
    assert record_bytes(targets, 1, "x") != record_bytes(targets, 1, "y")
    assert parse_record(record_bytes(targets, 1, "x"), KEY) == parse_record(
        record_bytes(targets, 1, "y"), KEY
    )


def test_an_alias_stands_for_its_greatest_share():
    assert AliasState("x", 1, (Target(A, 1), Target(B, 9))).main == B
    assert AliasState("x", 1, (Target(A, 5), Target(B, 5))).main == A


@given(st.lists(st.integers(1, 10_000), min_size=1, unique=True))
def test_the_highest_number_is_the_alias(sequences):
    paths = [AliasKey("m", "stable", n).path for n in sequences]
    assert heads(paths) == {("m", "stable"): max(sequences)}


def test_numbers_are_compared_as_numbers():
    assert heads(["aliases/m/stable/9.json", "aliases/m/stable/10.json"]) == {("m", "stable"): 10}


def test_aliases_of_several_models_are_kept_apart():
    paths = [
        AliasKey("m", "stable", 1).path,
        AliasKey("m", "canary", 4).path,
        AliasKey("n", "stable", 2).path,
    ]
    assert heads(paths) == {("m", "stable"): 1, ("m", "canary"): 4, ("n", "stable"): 2}


@pytest.mark.parametrize(
    "path",
    [
        "aliases/m/stable/01.json",
        "aliases/m/stable/-1.json",
        "aliases/m/stable/1.json#1",
        "aliases/m/stable/1.json.tmp",
        "aliases/m/1.json",
        "aliases/m/stable/x/1.json",
        "manifests/m/stable/1.json",
    ],
)
def test_other_files_are_no_records(path):
    assert parse_path(path) is None
    assert heads([path]) == {}


@given(st.integers(0, 10**17))
def test_a_path_names_its_record(sequence):
    key = AliasKey("m.1", "a-b", sequence)
    assert parse_path(key.path) == key


def test_folders_hold_their_records():
    assert KEY.path.startswith(folder("smollm2", "stable") + "/")
    assert folder() == "aliases"


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"targets":1}', b'{"targets":[{"digest":"x"}]}'])
def test_unreadable_records_are_errors(data):
    with pytest.raises(ValueError, match=r"aliases/smollm2/stable/7\.json"):
        parse_record(data, KEY)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ([], "no target"),
        ([Target(A), Target(A)], "twice"),
        ([Target(A, 0)], "out of bounds"),
        ([Target(A, WEIGHT_MAX + 1)], "out of bounds"),
        ([Target(f"sha256:{n:064x}") for n in range(TARGETS_MAX + 1)], "at most"),
    ],
)
def test_impossible_targets_are_named(targets, problem):
    assert problem in check_targets(targets)


def test_good_targets_have_no_problem():
    assert check_targets([Target(A, 9), Target(B, 1)]) == ""
