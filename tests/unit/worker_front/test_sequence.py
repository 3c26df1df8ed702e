"""Tokens on their way to one caller: joined while nobody reads, in order, and ended once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.protocol import Output, TokenLogprobs
from tests.unit.worker_front.fakes import make_sequence
from tokenloom.kit.errors import CallError


async def test_steps_that_nobody_read_are_joined_into_one_batch() -> None:
    sequence = make_sequence()
    for index in range(3):
        sequence.push(Output(sequence.key, [10 + index], index), 100 + index)
    batch = await sequence.next()
    assert (batch.first, batch.start, batch.tokens, batch.final) == (True, 0, [10, 11, 12], None)
    assert (sequence.first_ns, sequence.last_ns, sequence.received) == (100, 102, 3)


async def test_only_the_first_batch_is_first() -> None:
    sequence = make_sequence(output=5)
    sequence.push(Output(sequence.key, [1], 5), 1)
    assert (await sequence.next()).first
    sequence.push(Output(sequence.key, [2], 6), 2)
    batch = await sequence.next()
    assert (batch.first, batch.start, batch.tokens) == (False, 6, [2])
    assert sequence.completion_tokens == 7


async def test_reader_sleeps_until_a_token_comes() -> None:
    sequence = make_sequence()
    reading = asyncio.create_task(sequence.next())
    await asyncio.sleep(0)
    assert not reading.done()
    sequence.push(Output(sequence.key, [1], 0), 1)
    assert (await reading).tokens == [1]


async def test_final_output_comes_with_the_last_tokens() -> None:
    sequence = make_sequence()
    sequence.push(Output(sequence.key, [1], 0), 1)
    sequence.push(Output(sequence.key, [2], 1, finish="stop", stop_token_id=2), 2)
    batch = await sequence.next()
    assert batch.tokens == [1, 2]
    assert batch.final is not None
    assert batch.final.finish == "stop"


async def test_error_follows_the_tokens_that_were_already_here() -> None:
    sequence = make_sequence()
    sequence.push(Output(sequence.key, [1], 0), 1)
    sequence.fail(CallError("ENGINE_RESTARTED", "gone"))
    sequence.fail(CallError("DRAINING", "too late to matter"))
    assert (await sequence.next()).tokens == [1]
    with pytest.raises(CallError, match="gone"):
        await sequence.next()


async def test_error_wakes_a_sleeping_reader() -> None:
    sequence = make_sequence()
    reading = asyncio.create_task(sequence.next())
    await asyncio.sleep(0)
    sequence.fail(CallError("DRAINING", "going"))
    with pytest.raises(CallError, match="going"):
        await reading


async def test_error_after_the_end_is_ignored() -> None:
    sequence = make_sequence()
    sequence.push(Output(sequence.key, [1], 0, finish="length"), 1)
    sequence.fail(CallError("DRAINING", "late"))
    assert (await sequence.next()).final is not None


async def test_reader_that_left_does_not_disturb_the_engine() -> None:
    sequence = make_sequence()
    reading = asyncio.create_task(sequence.next())
    await asyncio.sleep(0)
    reading.cancel()
    sequence.push(Output(sequence.key, [1], 0), 1)
    with pytest.raises(asyncio.CancelledError):
        await reading


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=30))
def test_no_token_is_lost_doubled_or_reordered_however_it_is_read(steps: list[tuple[int, bool]]) -> None:
    async def run() -> None:
        sequence, index, read = make_sequence(), 0, []
        for position, (count, reads) in enumerate(steps):
            last = position == len(steps) - 1
            tokens = list(range(index, index + count))
            probabilities = [TokenLogprobs(float(token), [], []) for token in tokens]
            output = Output(sequence.key, tokens, index, probabilities, finish="length" if last else "")
            sequence.push(output, position)
            index += count
            if reads or last:
                batch = await sequence.next()
                assert batch.start == len(read)
                assert [entry.chosen for entry in batch.logprobs] == batch.tokens
                read += batch.tokens
        assert read == list(range(index))

    asyncio.run(run())
