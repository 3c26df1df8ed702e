"""The stop scanner against an oracle that sees all the text at once."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.core.stops import StopScanner

ALPHABET = "ab."
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)
texts = st.text(ALPHABET + "cé", max_size=60)
cuts = st.lists(st.integers(0, 60), max_size=12)


def oracle(text, stops, include):
    """(shown, matched): the first end at which any stop string is complete; there, the longest."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text, marks):
    edges = [0, *sorted(min(mark, len(text)) for mark in marks), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def scan(pieces, stops, include):
    scanner = StopScanner(stops, include_stop=include)
    shown = ""
    for piece in pieces:
        result = scanner.push(piece)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    return shown + scanner.flush(), None


@settings(max_examples=500, deadline=None)
@given(texts, stop_lists, cuts, st.booleans())
def test_text_in_pieces_stops_where_whole_text_would(text, stops, marks, include):
    assert scan(cut(text, marks), stops, include) == oracle(text, stops, include)


@settings(max_examples=300, deadline=None)
@given(texts, stop_lists, cuts)
def test_exactly_the_longest_possible_beginning_is_held_back(text, stops, marks):
    scanner, seen, shown = StopScanner(stops), "", ""
    for piece in cut(text, marks):
        seen += piece
        result = scanner.push(piece)
        shown += result.text
        if result.matched is not None:
            return
        longest = max(
            (n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert len(seen) - len(shown) == longest


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        (["Hello\n", "\nUser:"], ["\n\nUser:"], "Hello", "\n\nUser:"),
        (["a", "b", "a", "b", "c"], ["abc"], "ab", "abc"),
        (["aaaa"], ["aa", "aaa"], "", "aa"),
        (["xxend"], ["d", "end"], "xx", "end"),
        (["no stop here"], ["STOP"], "no stop here", None),
        (["ends in ST"], ["STOP"], "ends in ST", None),
        (["🎉", "🎉!"], ["🎉!"], "🎉", "🎉!"),
    ],
)
def test_examples(pieces, stops, shown, matched):
    assert scan(pieces, stops, include=False) == (shown, matched)


def test_the_stop_string_stays_when_asked_for():
    assert scan(["one. two"], ["."], include=True) == ("one.", ".")


def test_a_hostile_stop_string_costs_no_more_than_its_characters():
    scanner = StopScanner(["a" * 255 + "b"] * 16)
    shown = "".join(scanner.push("a").text for _ in range(20_000))
    assert len(shown) == 20_000 - 255
