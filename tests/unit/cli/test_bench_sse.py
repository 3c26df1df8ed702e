"""Events that differ in their text alone are not decoded again; what is counted stays the same."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.bench.stats import Record
from tokenloom.cli import bench_sse
from tokenloom.cli.bench_sse import FRAMES_MAX, Frame, Stream

ENDPOINTS = ("chat", "completions")


def event(endpoint, text, ascii_only=False, usage=None, **more):
    choice = {"index": 0, "delta": {"content": text}} if endpoint == "chat" else {"index": 0, "text": text}
    body = {"id": "x", "choices": [choice | {"logprobs": None}], "usage": usage, **more}
    return b"data: " + json.dumps(body, ensure_ascii=ascii_only, separators=(",", ":")).encode() + b"\n\n"


def read(events):
    record = Record()
    stream = Stream(record)
    for number, data in enumerate(events):
        stream.feed(data, float(number))
    return record


@pytest.fixture
def decoded(monkeypatch):
    """Whole events that were decoded."""
    seen, loads = [], orjson.loads

    def noting(data):
        if data[:1] == b"{":
            seen.append(bytes(data))
        return loads(data)

    monkeypatch.setattr(bench_sse.orjson, "loads", noting)
    return seen


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_only_the_first_of_like_events_is_decoded(endpoint, decoded):
    record = read([event(endpoint, f" word{number}") for number in range(50)])
    assert record.pieces_s == [float(number) for number in range(50)]
    # The event, and once more with another text in its place.
    assert len(decoded) == 2


@given(
    st.sampled_from(ENDPOINTS),
    st.booleans(),
    st.lists(st.text(max_size=6) | st.sampled_from(['"', "\\", "\n", '"}', '","content":"', "\x00"])),
)
def test_every_text_is_counted_once_and_none_when_it_is_empty(endpoint, ascii_only, texts):
    record = read([event(endpoint, text, ascii_only) for text in texts])
    assert record.pieces_s == [float(number) for number, text in enumerate(texts) if text]


PARTS = (
    b'"a"',
    b'"',
    b"a",
    b"\\",
    b"}",
    b"{",
    b",",
    b'"error":1',
    b'"usage":{"completion_tokens":3}',
    b"null",
    b"",
)


def counted(data):
    """The oracle: pieces, tokens and whether there was an error, from all that was decoded; None: refused."""
    try:
        body = orjson.loads(data[len(b"data: ") : -2])
        pieces = sum(bool(choice["delta"].get("content")) for choice in body.get("choices", ()))
        return pieces, (body.get("usage") or {}).get("completion_tokens", 0), "error" in body
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


@given(st.lists(st.sampled_from(PARTS), max_size=6).map(b"".join))
def test_whatever_stands_in_the_texts_place_is_read_as_if_it_were_decoded(middle):
    first = event("chat", "TEXT")
    data = first.replace(b'"TEXT"', middle)
    record = Record()
    stream = Stream(record)
    stream.feed(first, 0.0)
    wanted = counted(data)
    if wanted is None:
        with pytest.raises((ValueError, KeyError, AttributeError, TypeError)):
            stream.feed(data, 1.0)
        return
    stream.feed(data, 1.0)
    assert (len(record.pieces_s) - 1, record.output_tokens, record.error != "") == wanted


def test_an_event_that_overlaps_its_own_frame_is_none_of_it():
    frame = Frame(b'data: {"a":"', b'":1}')
    assert not frame.holds_text(b'data: {"a":"":1}'[:14])


def test_usage_beside_a_text_is_taken_from_every_event():
    record = read(
        [event("chat", "a", usage={"prompt_tokens": 1, "completion_tokens": n}) for n in range(1, 6)]
    )
    assert (len(record.pieces_s), record.output_tokens) == (5, 5)
    counts = (("a", 1), ("", 2), ("b", 1))
    last = read([event("chat", text, usage={"completion_tokens": count}) for text, count in counts])
    assert last.output_tokens == 1


def test_a_text_that_is_a_part_of_something_else_is_no_frame():
    """The first `"text":"a"` of the event is not the choice's."""
    line = b'data: {"note":{"text":"a"},"choices":[{"text":"a"}]}'
    assert Frame.around(line, orjson.loads(line[6:])) is None
    assert read([line + b"\n\n"] * 3).pieces_s == [0.0, 1.0, 2.0]


def test_two_choices_are_two_pieces_each_time():
    line = b'data: {"choices":[{"text":"a"},{"text":"b"}]}\n\n'
    assert len(read([line] * 4).pieces_s) == 8


def test_a_stream_whose_events_always_change_is_soon_only_decoded(decoded):
    count = 30
    assert len(read([event("chat", "a", created=number) for number in range(count)]).pieces_s) == count
    assert len(decoded) == count + FRAMES_MAX
