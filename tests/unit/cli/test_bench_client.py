"""What the load client reads off a stream, how it drives a load, and what it says of wrong options."""

import asyncio
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.bench.prompts import Calibration, Item, Part
from tokenloom.bench.stats import Record
from tokenloom.cli import bench_load, bench_options
from tokenloom.cli.bench_sse import EVENT_BYTES_MAX, Stream, error_reason
from tokenloom.cli.errors import CliError

CHAT = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n'
    b": a comment\n\n"
    b'data: {"choices":[{"index":0,"delta":{"content":"lo \\u2713\\n\\ndata: x"}}],"usage":null}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    b"data: [DONE]\n\n"
)


def read(data, cuts=()):
    """A stream's record after `data` came in the pieces between `cuts`."""
    record = Record()
    stream = Stream(record)
    edges = [0, *sorted(cuts), len(data)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        stream.feed(data[start:end], float(number))
    return record, stream


def test_pieces_with_text_are_counted_and_usage_is_taken():
    record, stream = read(CHAT)
    assert stream.done
    assert len(record.pieces_s) == 2
    assert (record.prompt_tokens, record.output_tokens, record.cached_prompt_tokens) == (7, 2, 4)
    assert record.error == ""


@given(st.lists(st.integers(0, len(CHAT)), max_size=6))
def test_it_does_not_matter_where_the_bytes_are_cut(cuts):
    record, stream = read(CHAT, cuts)
    assert stream.done
    assert len(record.pieces_s) == 2
    assert record.output_tokens == 2


def test_text_completions_and_carriage_returns_are_read_too():
    record, stream = read(b'data: {"choices":[{"text":"a"}]}\r\n\r\ndata: [DONE]\r\n\r\n')
    assert stream.done
    assert len(record.pieces_s) == 1


def test_an_error_in_the_stream_is_the_requests_error():
    record, _ = read(b'data: {"error":{"message":"gone","type":"server_error","code":"NO_CAPACITY"}}\n\n')
    assert record.error == "NO_CAPACITY"


@pytest.mark.parametrize("data", [b"data: nothing\n\n", b"data: []\n\n", b"x" * (EVENT_BYTES_MAX + 1)])
def test_what_is_no_such_stream_is_refused(data):
    with pytest.raises(ValueError):
        read(data)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"code": "MODEL_NOT_FOUND", "message": "no"}}, ("MODEL_NOT_FOUND", "no")),
        ({"error": {"code": 404, "type": "NotFoundError", "message": "no"}}, ("HTTP_404", "no")),
        ({"error": {"code": None, "type": "Not Found", "message": "no"}}, ("NOT_FOUND", "no")),
        ({"detail": "Not Found"}, ("HTTP_404", "Not Found")),
        ("<html>", ("HTTP_404", "<html>")),
        (None, ("HTTP_404", "")),
    ],
)
def test_errors_are_read_in_every_shape(body, said):
    assert error_reason(body, 404) == said


class FakeTarget:
    """Answers after `took_s`; notes how many were asked at once."""

    model = "m"
    calibration = Calibration()

    def __init__(self, took_s=0.0):
        self.took_s = took_s
        self.live = self.most = 0
        self.asked = []

    def prepare(self, item, seed):
        return (item.parts[0].key, seed)

    async def ask(self, request, record):
        self.asked.append(request)
        self.live += 1
        self.most = max(self.most, self.live)
        await asyncio.sleep(self.took_s)
        self.live -= 1
        record.pieces_s.append(time.perf_counter())


def items(count, gap_s=0.0):
    return [Item((Part(str(number), 4),), 1, at_s=number * gap_s) for number in range(count)]


async def test_a_closed_loop_keeps_so_many_in_flight_and_sends_each_once():
    target, ended = FakeTarget(0.001), []
    records, run = await bench_load.closed(target, items(50), 7, 3, ended.append)
    assert target.most == 7
    assert sorted(target.asked, key=lambda a: int(a[0])) == [(str(n), 3) for n in range(50)]
    assert len(ended) == len(records) == 50
    assert all(r.due_s <= r.pieces_s[0] <= r.ended_s and r.output_tokens == 1 for r in records)
    assert (run.max_concurrency, run.request_rate) == (7, None)
    assert run.cpu_s > 0


async def test_an_open_loop_is_bounded_and_counts_the_wait_for_a_place_as_latency():
    target = FakeTarget(0.02)
    records, run = await bench_load.opened(target, items(6), 2, 0, lambda _: None)
    assert target.most == 2
    assert run.held_back == 4
    # All were due at once; the last pair could only be sent after two others had ended.
    assert records[5].ttft_s >= 0.06
    assert len({r.due_s for r in records}) == 1


async def test_an_open_loop_sends_when_due_and_says_the_rate():
    records, run = await bench_load.opened(FakeTarget(), items(5, 0.01), 9, 0, lambda _: None)
    assert run.request_rate == pytest.approx(100)
    assert records[4].due_s - records[0].due_s == pytest.approx(0.04)
    assert all(r.pieces_s[0] >= r.due_s for r in records)
    asked = await bench_load.opened(FakeTarget(), items(2, 0.01), 9, 0, lambda _: None, 80.0)
    assert asked[1].request_rate == 80


def test_lists_of_numbers_are_read():
    assert bench_options.concurrencies("1,8,32") == (1, 8, 32)
    assert bench_options.rates("0.5,2") == (0.5, 2.0)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0", "-1", "1.5", "10001", ",".join(["1"] * 65)])
def test_wrong_concurrencies_are_refused_by_name(text):
    with pytest.raises(CliError, match="--concurrency"):
        bench_options.concurrencies(text)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "x"])
def test_wrong_rates_are_refused_by_name(text):
    with pytest.raises(CliError, match="--rate"):
        bench_options.rates(text)


def test_every_bound_names_its_option():
    for option, call in {
        "--prompt-tokens": lambda: bench_options.lengths(0, 1),
        "--output-tokens": lambda: bench_options.lengths(1, 10**7),
        "--requests": lambda: bench_options.requests(0),
        "--slo-ttft-ms": lambda: bench_options.objectives(-1, None),
        "--slo-itl-ms": lambda: bench_options.objectives(None, float("nan")),
        "--rate-scale": lambda: bench_options.fit(0, 1, None, None),
        "--length-scale": lambda: bench_options.fit(1, float("inf"), None, None),
        "--input-max": lambda: bench_options.fit(1, 1, 0, None),
        "--address": lambda: bench_options.address("ftp://x"),
    }.items():
        with pytest.raises(CliError, match=option) as caught:
            call()
        assert caught.value.status == 2


def test_addresses_become_urls():
    assert bench_options.address("127.0.0.1:8080") == "http://127.0.0.1:8080"
    assert bench_options.address("https://h/v1/") == "https://h"


def test_a_trace_that_cannot_be_read_is_one_line(tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n")
    for path, what in ((wrong, "line 1"), (tmp_path / "none", "No such file")):
        with pytest.raises(CliError, match=what):
            bench_options.read_trace(bench_options.TraceOptions(path))
    assert bench_options.read_trace(bench_options.TraceOptions()) == ((), 0)
