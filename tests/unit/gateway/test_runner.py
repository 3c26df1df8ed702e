"""One output against a scripted mesh: what is called, what is waited, what is given up, and when."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from opentelemetry.context import Context

from services.gateway import metrics
from services.gateway.adapters.pieces import Spelling
from services.gateway.core.choice import Choice, ChoiceRules, WorkerMessage
from services.gateway.core.detokenise import ByteDetokeniser
from services.gateway.core.plan import FilledSampling
from services.gateway.core.ports import SequenceRequest
from services.gateway.core.request import Finish
from services.gateway.core.retry import RetryPolicy
from services.gateway.core.stops import StopScanner
from services.gateway.fanout import merged
from services.gateway.runner import Runner, RunnerTools
from tests.unit.gateway.made import byte_level, message
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import CallError

TOKENIZER = byte_level()
SPELLING = Spelling(TOKENIZER)
IDS = TOKENIZER.encode("Paris is the capital of France").ids


class Stream:
    """Gives its items in turn: messages, errors, None for a good end, or a thing to await first."""

    def __init__(self, items):
        self.items = list(items)
        self.cancelled = False

    async def read(self):
        item = self.items.pop(0) if self.items else None
        if callable(item):
            item = await item()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


class Mesh:
    def __init__(self, *scripts):
        self.streams = [Stream(script) for script in scripts]
        self.calls = []
        self.timeouts = []

    def generate(self, request, *, timeout_s, trace):
        self.calls.append(request)
        self.timeouts.append(timeout_s)
        return self.streams[len(self.calls) - 1]


class House:
    """A runner with a clock that moves only while it waits between attempts."""

    def __init__(self, *scripts, deadline_s=60.0, queue_timeout_s=None, stops=()):
        self.mesh = Mesh(*scripts)
        self.clock = FakeClock()
        self.waits = []
        self.choice = Choice(
            0,
            ChoiceRules(len(IDS), 0, frozenset(), False),
            ByteDetokeniser(SPELLING.plain_pieces),
            StopScanner(stops) if stops else None,
        )
        policy = RetryPolicy(attempts_max=6, breaks_max=2, backoff_initial_s=0.1, backoff_max_s=1.0)
        self.runner = Runner(
            self.choice,
            request(deadline_unix_ms=self.clock.unix_ms() + int(1000 * deadline_s)),
            RunnerTools(self.mesh, policy, self.clock, lambda: 0.0, self.sleep),
            context=Context(),
            arrival_s=self.clock.monotonic(),
            queue_timeout_s=queue_timeout_s,
            meters=metrics.of_model("tiny"),
        )

    async def sleep(self, seconds):
        self.waits.append(round(seconds, 3))
        self.clock.advance(seconds)

    async def text(self):
        return "".join([event.text async for event in self.runner.events()])


def request(**changes):
    facts = {
        "request_id": "r", "model_version": "sha256:x", "tenant": "t", "priority": 2, "arrival_unix_ms": 1,
        "deadline_unix_ms": 2, "attempt": 1, "prompt_ids": (1, 2), "output_ids": (),
        "sampling": FilledSampling(1, 1, 0, 0, 1, 0, 0, 7), "seed": 7, "max_new_tokens": len(IDS),
        "min_new_tokens": 0, "stop_token_ids": (), "logprobs": False, "top_logprobs": 0, "cache_salt": "",
        "prefix": (),
    }  # fmt: skip
    return SequenceRequest(**(facts | changes))


def tokens(start, stop, last=False):
    """Messages for IDS[start:stop], one token each."""
    made = [message(i, [IDS[i]]) for i in range(start, stop)]
    if last:
        made[-1] = message(stop - 1, [IDS[stop - 1]], Finish.LENGTH)
    return made


ALL = tokens(0, len(IDS), last=True)


def error(reason, retry_after_s=None):
    return CallError(reason, reason.lower(), retry_after_s=retry_after_s)


async def test_a_whole_stream_is_read_to_its_end_so_that_its_trailers_arrive():
    house = House([*ALL, None])
    assert await house.text() == "Paris is the capital of France"
    assert house.mesh.streams[0].items == []


async def test_a_worker_that_never_closes_its_stream_does_not_hold_the_answer(monkeypatch):
    monkeypatch.setattr("services.gateway.runner.TRAILERS_WAIT_MAX_S", 0.01)
    house = House([*ALL, asyncio.Event().wait])
    assert await house.text() == "Paris is the capital of France"
    assert house.mesh.streams[0].cancelled


async def test_waits_grow_between_refusals_and_hints_are_obeyed():
    full = error("WORKER_FULL")
    house = House([full], [full], [error("WORKER_FULL", retry_after_s=3.0)], [*ALL, None])
    assert await house.text() == "Paris is the capital of France"
    assert house.waits == [0.05, 0.1, 3.0]


async def test_a_resumed_call_carries_the_tokens_so_far_and_the_time_that_is_left():
    house = House([*tokens(0, 4), error("SERVICE_UNAVAILABLE")], [*tokens(4, len(IDS), last=True), None])
    assert await house.text() == "Paris is the capital of France"
    assert house.mesh.calls[1].output_ids == tuple(IDS[:4])
    assert house.mesh.calls[1].attempt == 2
    assert house.mesh.timeouts[1] == pytest.approx(60 - house.waits[0], abs=0.01)


async def test_progress_makes_the_next_wait_short_again():
    gone = error("SERVICE_UNAVAILABLE")
    house = House([gone], [gone], [*tokens(0, 2), gone], [*tokens(2, len(IDS), last=True), None])
    await house.text()
    assert house.waits == [0.05, 0.1, 0.05]


async def test_what_cannot_succeed_goes_to_the_caller_unchanged():
    refused = error("QUEUE_FULL")
    house = House([refused])
    with pytest.raises(CallError) as failure:
        await house.text()
    assert failure.value is refused
    assert house.waits == []


async def test_attempts_are_bounded():
    house = House(*[[error("WORKER_FULL")]] * 10)
    with pytest.raises(CallError, match="worker_full"):
        await house.text()
    assert len(house.mesh.calls) == 6


async def test_a_wait_past_the_deadline_is_not_begun():
    house = House([error("WORKER_FULL", retry_after_s=10.0)], deadline_s=5.0)
    with pytest.raises(CallError, match="worker_full"):
        await house.text()
    assert house.waits == []


async def test_an_expired_request_is_never_sent():
    house = House(ALL, deadline_s=0.0)
    with pytest.raises(CallError) as failure:
        await house.text()
    assert failure.value.reason == "DEADLINE_EXCEEDED"
    assert house.mesh.calls == []


async def test_a_deadline_that_passes_in_the_stream_says_how_far_it_came():
    house = House([*tokens(0, 3), error("DEADLINE_EXCEEDED")])
    with pytest.raises(CallError, match="the deadline passed after 0 ms and 3 tokens"):
        await house.text()


async def test_queue_timeout_bounds_the_wait_for_the_first_token_over_all_attempts():
    house = House([error("WORKER_FULL", retry_after_s=2.0)], [error("WORKER_FULL")], queue_timeout_s=2.0)
    with pytest.raises(CallError) as failure:
        await house.text()
    assert failure.value.reason == "WORKER_FULL"
    assert len(house.mesh.calls) == 1


async def test_queue_timeout_does_not_bound_a_stream_that_began():
    house = House(
        [*tokens(0, 2), error("SERVICE_UNAVAILABLE", retry_after_s=5.0)],
        [*tokens(2, len(IDS), last=True), None],
        queue_timeout_s=2.0,
    )
    assert await house.text() == "Paris is the capital of France"


async def test_a_stop_string_cancels_the_call_at_once():
    house = House([*ALL, None], stops=["capital"])
    assert await house.text() == "Paris is the "
    assert house.mesh.streams[0].cancelled
    assert len(house.mesh.streams[0].items) > 0


async def test_leaving_cancels_the_call():
    house = House([*ALL, None])
    async with aclosing(house.runner.events()) as events:
        await anext(events)
    assert house.mesh.streams[0].cancelled


async def test_every_attempt_is_cancelled_when_it_is_over():
    house = House([error("WORKER_FULL")], [*tokens(0, 1), error("ENGINE_RESTARTED")], [*tokens(1, 2), None],
                  [*tokens(2, len(IDS), last=True), None])  # fmt: skip
    assert await house.text() == "Paris is the capital of France"
    assert all(stream.cancelled for stream in house.mesh.streams)


async def test_times_and_cache_hits_are_those_of_the_first_worker():
    first = WorkerMessage(0, [IDS[0]], [], None, "worker-0", 2)
    again = WorkerMessage(1, [IDS[1]], [], None, "worker-1", 9)
    house = House([first, error("ENGINE_RESTARTED")], [again, *tokens(2, len(IDS), last=True), None])
    await house.text()
    assert house.runner.cached_prompt_tokens == 2
    assert house.runner.first_token_s == 0.0


async def test_outputs_side_by_side_all_arrive():
    houses = [House([*ALL, None]) for _ in range(5)]
    events = [event async for event in merged([house.runner for house in houses])]
    assert "".join(e.text for e in events).count("P") == 5
    assert sum(event.end is not None for event in events) == 5


async def test_the_first_failure_of_several_outputs_ends_all_of_them():
    good, bad = House([tokens(0, 1)[0], asyncio.Event().wait]), House([error("QUEUE_FULL")])
    with pytest.raises(CallError, match="queue_full"):
        [event async for event in merged([good.runner, bad.runner])]
    assert good.mesh.streams[0].cancelled


async def test_a_slow_caller_of_several_outputs_makes_them_wait_and_loses_nothing(monkeypatch):
    monkeypatch.setattr("services.gateway.fanout.EVENTS_QUEUED_MAX", 1)
    houses = [House([*ALL, None]) for _ in range(3)]
    count = 0
    async for _ in merged([house.runner for house in houses]):
        count += 1
        await asyncio.sleep(0)
    assert count == 3 * len(IDS)
