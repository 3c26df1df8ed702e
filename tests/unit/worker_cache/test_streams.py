"""Streams shared between files, threads that are waited for, and messages that are read in place."""

import asyncio
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.worker.adapters import cache_threads
from services.worker.adapters.cache_download import RANGE_BYTES_MAX, RANGE_BYTES_MIN, pause_s, range_bytes
from services.worker.adapters.cache_streams import Streams
from services.worker.adapters.cache_threads import Threads, until
from services.worker.adapters.store import data_of
from tokenloom.kit.errors import CallError


async def test_streams_are_bounded_and_go_to_the_blob_that_has_the_fewest():
    streams, order, hold = Streams(2), [], asyncio.Event()

    async def use(blob):
        async with streams.one(blob):
            order.append(blob)
            await hold.wait()

    first = [asyncio.create_task(use(blob)) for blob in "aaab"]
    await asyncio.sleep(0)
    assert order == ["a", "a"]
    first[0].cancel()
    await asyncio.gather(first[0], return_exceptions=True)
    await asyncio.sleep(0)
    assert order == ["a", "a", "b"], "a has one, b has none"
    hold.set()
    await asyncio.gather(*first[1:])
    assert order == ["a", "a", "b", "a"]


async def test_a_waiter_that_was_cancelled_takes_no_stream():
    streams, hold = Streams(1), asyncio.Event()

    async def use(blob):
        async with streams.one(blob):
            await hold.wait()

    tasks = [asyncio.create_task(use(blob)) for blob in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    # In the same moment, so that the cancelled one is still listed.
    hold.set()
    await asyncio.gather(tasks[0], tasks[2])
    async with streams.one("d"):
        assert tasks[1].cancelled()


async def test_a_cancelled_caller_leaves_after_its_thread():
    threads, began, hold, ended = Threads(1), threading.Event(), threading.Event(), []

    def work():
        began.set()
        hold.wait(10)
        ended.append(True)

    task = asyncio.create_task(threads.run(work))
    await asyncio.to_thread(began.wait, 10)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


@pytest.mark.parametrize(("signs", "answer"), [([0, 0, 0, 0], False), ([0, 0, 1, 1, 2, 2], True)])
async def test_waiting_ends_when_nobody_is_at_work(monkeypatch, signs, answer):
    monkeypatch.setattr(cache_threads, "LOCK_POLL_S", 0.001)
    left = iter(signs)

    async def ready():
        return len(asked) == 5 or bool(asked.append(1))

    asked = []
    assert await until(ready, 0.002, lambda: next(left)) is answer


@given(st.binary(max_size=300) | st.integers(0, 3_000_000).map(bytes))
def test_data_of_a_message_is_found_in_place(data):
    message = pb.FetchBlobResponse(data=data).SerializeToString()
    assert data_of(message) == data


def test_data_of_a_message_with_fields_of_a_later_release_is_found():
    message = pb.FetchBlobResponse(data=b"abc").SerializeToString() + b"\x10\x05"
    assert data_of(message) == b"abc"


@given(st.binary(max_size=30) | st.binary(max_size=8).map(lambda tail: b"\n" + tail))
@example(b"\n")
@example(b"\n\x80")
@example(b"\n\x80\x00")
def test_no_bytes_read_as_a_message_that_they_are_not(message):
    try:
        parsed = pb.FetchBlobResponse.FromString(message).data
    except Exception:
        with pytest.raises(CallError):
            data_of(message)
    else:
        assert data_of(message) == parsed


def test_small_blobs_have_work_for_all_streams_and_large_ones_are_cut():
    assert range_bytes(40 << 20, 4) == 10 << 20
    assert range_bytes(10, 4) == RANGE_BYTES_MIN
    assert range_bytes(1 << 40, 4) == RANGE_BYTES_MAX


def test_pauses_grow_and_are_bounded():
    pauses = [pause_s(tries) for tries in range(1, 12)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.5
    assert pauses[-1] == pauses[-2] == 5.0
