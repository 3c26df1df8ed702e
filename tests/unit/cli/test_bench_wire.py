"""The load client's connection, on a transport that is written down here."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.cli import bench_wire
from tokenloom.cli.bench_wire import Answer, Connection, Disconnected

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


class Wire:
    """Notes what is written."""

    def __init__(self):
        self.written = b""
        self.closed = self.aborted = False

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True


@pytest.fixture
def made():
    return connected()


def connected():
    connection, wire = Connection(), Wire()
    connection.connection_made(wire)
    return connection, wire


async def asked(connection, *steps, take=None):
    """The answer to a request, after all that happens to the connection meanwhile."""
    task = asyncio.ensure_future(connection.ask(b"request", take))
    await asyncio.sleep(0)
    for step in steps:
        if isinstance(step, bytes):
            connection.data_received(step)
        else:
            step()
    return await task


async def test_a_request_is_sent_as_it_is_and_the_answer_kept(made):
    connection, wire = made
    assert await asked(connection, CHUNKED + BODY) == Answer(200, b"hello world")
    assert wire.written == b"request"
    assert connection.usable


@given(st.lists(st.integers(0, len(CHUNKED + BODY)), max_size=8))
def test_it_does_not_matter_where_the_bytes_are_cut(cuts):
    data, pieces = CHUNKED + BODY, []
    edges = [0, *sorted(cuts), len(data)]

    async def read():
        connection, _ = connected()
        parts = [data[start:end] for start, end in itertools.pairwise(edges)]
        return await asked(connection, *parts, take=lambda piece, _: pieces.append(piece))

    assert asyncio.run(read()) == Answer(200, b"")
    assert b"".join(pieces) == b"hello world"


async def test_all_that_came_at_once_has_one_time(made, monkeypatch):
    times = iter([1.0, 2.0])
    monkeypatch.setattr(bench_wire.time, "perf_counter", lambda: next(times))
    taken = []
    two = b"1\r\na\r\n1\r\nb\r\n"
    await asked(made[0], CHUNKED + two, two + b"0\r\n\r\n", take=lambda *given: taken.append(given))
    assert taken == [(b"a", 1.0), (b"b", 1.0), (b"a", 2.0), (b"b", 2.0)]


async def test_a_refusal_is_kept_and_not_taken(made):
    refused = b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\nno"
    assert await asked(made[0], refused, take=pytest.fail) == Answer(429, b"no")


async def test_what_comes_before_the_final_answer_is_passed_over(made):
    taken = []
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    answer = await asked(made[0], early + CHUNKED, BODY, take=lambda piece, _: taken.append(piece))
    assert (answer.status, taken) == (200, [b"hello", b" world"])


async def test_one_request_after_the_other_on_one_connection(made):
    connection, wire = made
    for _ in range(3):
        assert (await asked(connection, CHUNKED + BODY)).body == b"hello world"
    assert wire.written == b"request" * 3


async def test_an_answer_that_says_so_is_the_last(made):
    connection, wire = made
    last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na"
    assert (await asked(connection, last)).body == b"a"
    assert wire.closed
    assert not connection.usable
    with pytest.raises(Disconnected):
        await connection.ask(b"more")


async def test_a_body_without_a_length_ends_with_the_connection(made):
    connection, _ = made
    answer = await asked(
        connection, b"HTTP/1.1 200 OK\r\n\r\n", b"abc", lambda: connection.connection_lost(None)
    )
    assert answer == Answer(200, b"abc")


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"", None), (CHUNKED + b"5\r\nhel", None), (b"HTTP/1.1 200 OK\r\n\r\nabc", OSError("reset")),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", None)],
)  # fmt: skip
async def test_an_answer_that_breaks_off_is_a_lost_connection(made, data, error):
    connection, _ = made
    with pytest.raises(Disconnected):
        await asked(connection, data, lambda: connection.connection_lost(error))


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", CHUNKED + b"x\r\n"])
async def test_what_is_no_http_is_refused_and_the_connection_closed(made, data):
    connection, wire = made
    with pytest.raises(ValueError, match="no HTTP"):
        await asked(connection, data)
    assert wire.aborted
    assert not connection.usable


async def test_what_the_taker_raises_ends_the_answer_and_nothing_is_taken_after_it(made):
    taken = []

    def take(piece, _):
        taken.append(piece)
        raise KeyError(piece)

    with pytest.raises(KeyError):
        await asked(made[0], CHUNKED + BODY, take=take)
    assert taken == [b"hello"]
    assert made[1].aborted


async def test_an_answer_that_is_kept_has_a_bound(made, monkeypatch):
    monkeypatch.setattr(bench_wire, "BODY_BYTES_MAX", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        await asked(made[0], CHUNKED + BODY)


async def test_whoever_stops_waiting_closes_the_connection(made):
    connection, wire = made
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await connection.ask(b"request")
    assert wire.aborted


async def test_bytes_that_nobody_asked_for_close_the_connection(made):
    connection, wire = made
    await asked(connection, CHUNKED + BODY)
    connection.data_received(b"HTTP/1.1 408 Timeout\r\n\r\n")
    assert wire.aborted
    connection.connection_lost(None)
    assert not connection.usable
