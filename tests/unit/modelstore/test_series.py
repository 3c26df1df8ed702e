"""Numbered records: which count, and which is the newest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core import deprecations
from services.modelstore.core.deprecations import MESSAGE_CHARS_MAX, Deprecation
from services.modelstore.core.series import newest_first, number_of, record_path

DIGEST = "sha256:" + "a" * 64


@given(st.lists(st.integers(0, 10**17), unique=True))
def test_numbers_come_newest_first(numbers):
    assert newest_first(record_path("x/y", n) for n in numbers) == sorted(numbers, reverse=True)


@pytest.mark.parametrize("path", ["x/01.json", "x/-1.json", "x/1.json#1", "x/a1.json", "x/1.jsonl", "x/1"])
def test_other_files_are_no_records(path):
    assert number_of(path) is None


def test_a_mark_survives_storing():
    data = deprecations.record_bytes(True, "use m@stable", 5, "x")
    assert deprecations.parse_record(data) == Deprecation("use m@stable", 5)


def test_a_record_may_take_the_mark_away():
    assert deprecations.parse_record(deprecations.record_bytes(False, "", 5, "x")) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"deprecated":true}'])
def test_what_is_no_record_is_an_error(data):
    with pytest.raises(ValueError, match="no deprecation record"):
        deprecations.parse_record(data)


def test_the_highest_record_of_each_version_counts():
    other = "sha256:" + "b" * 64
    paths = [deprecations.record_path(DIGEST, n) for n in (9, 10)] + [deprecations.record_path(other, 1)]
    assert deprecations.heads([*paths, "deprecations/x/1.json"]) == {DIGEST: 10, other: 1}


@pytest.mark.parametrize(
    ("deprecated", "message", "problem"),
    [
        (True, "old", ""),
        (True, "", ""),
        (False, "", ""),
        (False, "old", "set deprecated"),
        (True, "x" * (MESSAGE_CHARS_MAX + 1), "at most 512"),
    ],
)
def test_impossible_marks_are_named(deprecated, message, problem):
    problems = deprecations.problems(deprecated, message)
    assert bool(problems) == bool(problem)
    assert all(field == "message" and problem in why for field, why in problems)
