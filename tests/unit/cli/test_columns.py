"""Tables that fold: nothing is lost on a narrow terminal, and nothing is wider than it."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, Group

from tokenloom.cli.columns import Column, bar, count, duration, fold, packed, rate, share

COLUMNS = (Column("name", right=False, key=True), Column("one"), Column("second"), Column("third column"))
ROWS = [["alpha", "1", "22", "333"], ["b", "4444444", "5", ""]]


def drawn(renderable, width):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_wide_terminal_shows_one_table():
    assert drawn(Group(*fold(COLUMNS, ROWS, 80)), 80) == [
        "name       one  second  third column",
        "alpha        1      22           333",
        "b      4444444       5",
    ]


def test_columns_that_do_not_fit_go_below_under_the_same_keys_without_empty_rows():
    assert drawn(Group(*fold(COLUMNS, ROWS, 22)), 22) == [
        "name       one  second",
        "alpha        1      22",
        "b      4444444       5",
        "name   third column",
        "alpha           333",
    ]


def test_a_table_folds_when_it_is_one_cell_too_wide():
    natural = max(cell_len(line) for line in drawn(Group(*fold(COLUMNS, ROWS, 80)), 80))
    assert len(fold(COLUMNS, ROWS, natural)) == 1
    assert len(fold(COLUMNS, ROWS, natural - 1)) == 2


@given(
    width=st.integers(20, 200),
    rows=st.lists(st.lists(st.text("abc 1", min_size=1, max_size=9), min_size=7, max_size=7), min_size=1),
)
def test_every_cell_is_shown_within_any_width_that_takes_it(width, rows):
    columns = [Column("k", right=False, key=True), *(Column(f"c{n}") for n in range(6))]
    rows = [[str(number), *(cell.replace(" ", "_") for cell in row[1:])] for number, row in enumerate(rows)]
    lines = drawn(Group(*fold(columns, rows, width)), width)
    assert all(cell_len(line) <= width for line in lines)
    for row in rows:
        words = [word for line in lines if line.split()[0] == row[0] for word in line.split()[1:]]
        assert words == row[1:]


def test_a_long_key_is_cut_and_leaves_room_for_what_it_names():
    lines = drawn(Group(*fold(COLUMNS, [["x" * 50, "1", "2", "3"]], 24)), 24)
    assert lines[1] == "xxxxxxxxx…    1       2"


def test_items_are_packed_and_never_broken():
    assert drawn(packed(["one thing", "two things", "three"], 22), 22) == ["one thing  two things", "three"]
    assert drawn(packed(["x" * 30, "y"], 40), 40) == ["x" * 30 + "  y"]
    assert str(packed(["x" * 30, "y"], 20)) == "x" * 30 + "\ny"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count(0), "0"),
        (count(99_999), "99,999"),
        (count(123_456), "123k"),
        (count(12_345_678), "12.3M"),
        (rate(None), "–"),
        (rate(1.25), "1.2"),
        (rate(1234.4), "1,234"),
        (duration(0.0123), "12 ms"),
        (duration(59.94), "59.9 s"),
        (duration(125), "2m05s"),
        (duration(3 * 3600 + 7 * 60 + 59), "3h07m"),
        (duration(float("inf")), "–"),
        (duration(float("nan")), "–"),
        (share(None), "–"),
        (share(0.62), "62%"),
        (bar(0.62, 8), "█████░░░"),
        (bar(1.7, 3), "███"),
        (bar(-1, 3), "░░░"),
    ],
)
def test_numbers_are_short(said, expected):
    assert said == expected
