"""One engine across the lives of its process, with processes that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest

from services.worker.front.admission import Offer
from services.worker.front.engine import Engine, EngineBounds, EngineState, backoff_s
from services.worker.protocol import Failed, Output, Progress, Shutdown, Step
from tests.unit.worker_front.fakes import (
    BOUNDS,
    READY,
    FakeLaunch,
    FakeLink,
    make_engine,
    make_sequence,
    step,
    until,
)
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import CallError


@asynccontextmanager
async def started(
    clock: FakeClock | None = None, bounds: EngineBounds = BOUNDS
) -> AsyncIterator[tuple[Engine, FakeLaunch, FakeLink]]:
    launch = FakeLaunch()
    engine = make_engine(launch, clock=clock, bounds=bounds)
    engine.start("folder")
    link = await launch.next()
    link.say(READY)
    await engine.wait_ready()
    try:
        yield engine, launch, link
    finally:
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        link.die("exit status 0")
        while not stopping.done():
            await asyncio.sleep(0)
            if engine._link is not None:
                engine._link.kill()


def told(step: Step, queued_prefill_tokens: int, step_ns: int = 0) -> Step:
    """The same step with another load and length."""
    load = msgspec.structs.replace(step.load, queued_prefill_tokens=queued_prefill_tokens)
    return msgspec.structs.replace(step, load=load, step_ns=step_ns)


async def test_step_reaches_the_sequences_that_it_names() -> None:
    async with started() as (engine, _, link):
        one, two = make_sequence(), make_sequence()
        assert [engine.submit(one), engine.submit(two)] == [Offer.START, Offer.START]
        assert link.submitted == [one.key, two.key]
        link.say(step(Output(two.key, [9], 0), Output("nobody", [1], 0), running=2))
        assert (await two.next()).tokens == [9]
        assert one.received == 0
        assert engine.tally.generated_tokens == 1


async def test_finished_sequence_gives_its_place_to_the_next() -> None:
    async with started() as (engine, _, link):
        first = [make_sequence(), make_sequence()]
        waits = make_sequence(leased=False)
        assert [engine.submit(s) for s in (*first, waits)] == [Offer.START, Offer.START, Offer.QUEUE]
        link.say(step(Output(first[0].key, [9], 0, finish="stop"), running=1))
        assert link.submitted == [*(s.key for s in first), waits.key]


async def test_prompts_on_their_way_are_queued_until_a_step_that_began_after_them_tells() -> None:
    clock = FakeClock()
    async with started(clock) as (engine, _, link):
        sequence = make_sequence()
        engine.submit(sequence)
        assert engine.queued_prefill_tokens == sequence.length
        # This step began before the prompt was sent, so its load knows nothing of it.
        link.say(told(step(), 0, step_ns=5_000_000))
        assert engine.queued_prefill_tokens == sequence.length
        clock.advance(0.01)
        link.say(told(step(running=1), 7, step_ns=1_000_000))
        assert engine.queued_prefill_tokens == 7
        engine.submit(make_sequence())
        link.die()
        await until(lambda: engine.state is EngineState.LOADING)
        assert engine.queued_prefill_tokens == 0


async def test_who_sends_prompts_is_told_when_the_next_step_has_room_again() -> None:
    news: list[int] = []
    async with started() as (engine, _, link):
        engine._changed = lambda: news.append(engine.queued_prefill_tokens)
        for left in (5_000, READY.step_tokens_max, READY.step_tokens_max - 1, 10):
            link.say(told(step(running=1), left))
        assert news == [READY.step_tokens_max - 1]


async def test_cancel_is_sent_at_once_and_only_for_what_the_engine_holds() -> None:
    async with started() as (engine, _, link):
        held, waits = [make_sequence(), make_sequence()], make_sequence(leased=False)
        for sequence in (*held, waits):
            engine.submit(sequence)
        engine.cancel(waits)
        assert link.cancelled == []
        engine.cancel(held[0])
        assert link.cancelled == [held[0].key]
        engine.cancel(held[0])
        assert link.cancelled == [held[0].key]


async def test_finished_sequence_needs_no_cancel() -> None:
    async with started() as (engine, _, link):
        sequence = make_sequence()
        engine.submit(sequence)
        link.say(step(Output(sequence.key, [9], 0, finish="length")))
        engine.cancel(sequence)
        assert link.cancelled == []


async def test_death_ends_its_sequences_and_another_life_begins() -> None:
    async with started() as (engine, launch, link):
        held, waits = [make_sequence(), make_sequence()], make_sequence(leased=False)
        for sequence in (*held, waits):
            engine.submit(sequence)
        link.die("killed by SIGKILL")
        for sequence in (*held, waits):
            with pytest.raises(CallError, match="SIGKILL") as ended:
                await sequence.next()
            assert ended.value.reason == "ENGINE_RESTARTED"
            assert ended.value.metadata["worker"] == "1.2.3.4:9100"
        assert engine.state is EngineState.LOADING
        assert engine.submit(make_sequence()) is Offer.FULL
        again = await launch.next()
        again.say(READY)
        assert engine.state is EngineState.READY
        assert engine.restarts == 1
        assert engine.submit(make_sequence()) is Offer.START
        again.die("exit status 0")


async def test_sequence_is_refused_when_the_engine_takes_no_commands() -> None:
    async with started() as (engine, _, link):
        link.takes_commands = False
        assert engine.submit(make_sequence()) is Offer.FULL
        assert not engine.admission.active


async def test_sequence_that_the_engine_refuses_ends_as_worker_full() -> None:
    async with started() as (engine, _, link):
        sequence = make_sequence()
        engine.submit(sequence)
        link.say(step(Output(sequence.key, [], 0, finish="error", error="no place")))
        with pytest.raises(CallError, match="no place") as refused:
            await sequence.next()
        assert refused.value.reason == "WORKER_FULL"


async def test_progress_of_loading_is_known() -> None:
    launch = FakeLaunch()
    engine = make_engine(launch)
    engine.start("folder")
    link = await launch.next()
    link.say(Progress("weights", 0.25))
    assert (engine.state, engine.progress) == (EngineState.LOADING, 0.25)
    link.die()
    await engine.stop()


async def test_load_that_fails_for_good_is_not_tried_again() -> None:
    launch = FakeLaunch()
    engine = make_engine(launch)
    engine.start("folder")
    link = await launch.next()
    link.say(Failed("MODEL_UNSUPPORTED", "no attention here", {"architecture": "Mamba"}))
    link.die()
    with pytest.raises(CallError, match="no attention") as failed:
        await engine.wait_ready()
    assert (failed.value.reason, failed.value.metadata) == ("MODEL_UNSUPPORTED", {"architecture": "Mamba"})
    assert (engine.state, launch.count) == (EngineState.FAILED, 1)


async def test_load_is_tried_as_often_as_the_bound_says() -> None:
    launch = FakeLaunch()
    engine = make_engine(launch)
    engine.start("folder")
    for _ in range(BOUNDS.load_attempts_max):
        (await launch.next()).die("exit status 137")
    with pytest.raises(CallError, match="137") as failed:
        await engine.wait_ready()
    assert failed.value.reason == "MODEL_LOAD_FAILED"
    assert launch.count == BOUNDS.load_attempts_max


async def test_process_that_cannot_start_counts_as_a_failed_load() -> None:
    launch = FakeLaunch()
    launch.refuses = OSError("no more processes")
    engine = make_engine(launch)
    engine.start("folder")
    with pytest.raises(CallError, match="no more processes"):
        await engine.wait_ready()


async def test_engine_that_once_served_is_started_again_and_again() -> None:
    async with started() as (engine, launch, link):
        link.die()
        for _ in range(BOUNDS.load_attempts_max + 2):
            (await launch.next()).die()
        last = await launch.next()
        last.say(READY)
        assert engine.state is EngineState.READY
        assert launch.count == BOUNDS.load_attempts_max + 4
        last.die("exit status 0")


async def test_silent_engine_with_sequences_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.front.engine.LOOK_EVERY_S", 0.001)
    clock = FakeClock()
    async with started(clock) as (engine, launch, link):
        clock.advance(BOUNDS.silence_max_s + 1)
        await asyncio.sleep(0.01)
        assert not link.killed
        sequence = make_sequence()
        engine.submit(sequence)
        clock.advance(BOUNDS.silence_max_s + 1)
        with pytest.raises(CallError, match="silence_max_s"):
            await sequence.next()
        assert link.killed
        (await launch.next()).die()


async def test_load_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.front.engine.LOOK_EVERY_S", 0.001)
    clock, launch = FakeClock(), FakeLaunch()
    engine = make_engine(launch, clock=clock, bounds=replace(BOUNDS, load_attempts_max=1))
    engine.start("folder")
    await launch.next()
    clock.advance(BOUNDS.load_timeout_s + 1)
    with pytest.raises(CallError, match="load_timeout_s"):
        await engine.wait_ready()


async def test_stop_asks_the_engine_to_end() -> None:
    launch = FakeLaunch()
    engine = make_engine(launch)
    engine.start("folder")
    link = await launch.next()
    link.say(READY)
    stopping = asyncio.create_task(engine.stop())
    await until(lambda: Shutdown() in link.commands)
    link.die("exit status 0")
    await stopping
    assert (engine.state, launch.count) == (EngineState.STOPPED, 1)


async def test_stop_ends_an_engine_that_loads_at_once_for_it_reads_no_commands() -> None:
    launch = FakeLaunch()
    engine = make_engine(launch)
    engine.start("folder")
    link = await launch.next()
    await engine.stop()
    assert (link.commands, link.killed, engine.state) == ([], True, EngineState.STOPPED)


def test_pauses_grow_to_their_bound() -> None:
    assert [backoff_s(deaths, 1.0) for deaths in (1, 2, 3, 4, 5, 500)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
