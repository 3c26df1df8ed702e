"""Cancellation, full workers, dying engines, deadlines, drains."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import grpc
import pytest
from loom.worker.v1 import worker_pb2

from tests.integration.worker.harness import Running, run_worker
from tests.integration.worker.processes import engines_of
from tokenloom.kit.errors import CallError, from_rpc_error

FOREVER = 8000


def running(count: int) -> Callable[[worker_pb2.LoadReport], bool]:
    return lambda report: report.models[0].running == count


def generated(report: worker_pb2.LoadReport) -> int:
    """Tokens since boot, of all tenants; a subscription's first report has them all."""
    return sum(pair.generated_tokens for pair in report.models[0].served)


async def read(call: grpc.aio.UnaryStreamCall) -> list[worker_pb2.GenerateResponse]:
    """What is left of a stream."""
    messages = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    return messages


async def start_endless(worker: Running, request_id: str = "endless") -> grpc.aio.UnaryStreamCall:
    """A stream that gave its first token and will not end by itself."""
    call = worker.client.start(worker.client.request(request_id, max_new_tokens=FOREVER))
    await call.read()
    return call


async def test_cancel_frees_the_slot_at_the_next_step() -> None:
    async with run_worker(sequences_max=1) as worker:
        call = await start_endless(worker)
        held = await worker.client.report_when(running(1))
        assert held.models[0].free_sequences == 0
        assert list(held.active_request_ids) == ["endless"]
        call.cancel()
        freed = await worker.client.report_when(running(0))
        assert freed.models[0].free_sequences == 1
        assert freed.models[0].free_blocks == freed.models[0].total_blocks
        assert not freed.active_request_ids
        assert len(await worker.client.tokens(worker.client.request())) == 16


async def test_leased_request_is_refused_by_a_full_worker_before_anything_is_sent() -> None:
    async with run_worker(sequences_max=1) as worker:
        endless = await start_endless(worker)
        call = worker.client.start(worker.client.request("second"))
        with pytest.raises(CallError) as full:
            await read(call)
        assert (full.value.reason, full.value.code) == ("WORKER_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "x-loom-worker" not in dict(await call.initial_metadata() or ())
        endless.cancel()


async def test_unleased_requests_wait_in_a_bounded_line() -> None:
    async with run_worker(sequences_max=1, unleased_queue_max=1) as worker:
        endless = await start_endless(worker)
        waiting = asyncio.create_task(worker.client.tokens(worker.client.request("waits"), lease=False))
        report = await worker.client.report_when(lambda r: r.models[0].waiting == 1)
        assert sorted(report.active_request_ids) == ["endless", "waits"]
        with pytest.raises(CallError, match="line is full") as full:
            await worker.client.tokens(worker.client.request("third"), lease=False)
        assert full.value.reason == "WORKER_FULL"
        endless.cancel()
        assert len(await waiting) == 16


async def test_nothing_is_sent_before_the_first_token() -> None:
    async with run_worker(sim_prefill_tokens_per_s=200) as worker:
        call = worker.client.start(worker.client.request(prompt_token_ids=[65] * 300))
        headers = asyncio.create_task(call.initial_metadata())
        await worker.client.report_when(lambda r: list(r.active_request_ids) == ["r1"])
        assert not headers.done()
        first = await call.read()
        assert first.HasField("started")
        assert first.tokens.token_ids
        assert "x-loom-worker" in dict(await headers)


@pytest.mark.parametrize("tokens_before", [0, 1])
async def test_killed_engine_ends_its_sequences_as_retriable_and_comes_back(tokens_before: int) -> None:
    async with run_worker(sim_prefill_tokens_per_s=500) as worker:
        request = worker.client.request(prompt_token_ids=[65] * 400, max_new_tokens=7000)
        call = worker.client.start(request)
        for _ in range(tokens_before):
            await call.read()
        await worker.client.report_when(lambda r: list(r.active_request_ids) == ["r1"])
        [engine] = engines_of()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(CallError) as ended:
            await read(call)
        assert (ended.value.reason, ended.value.code) == ("ENGINE_RESTARTED", grpc.StatusCode.UNAVAILABLE)
        assert ended.value.retriable
        assert "SIGKILL" in ended.value.message
        await worker.ready()
        assert engines_of() != [engine]
        assert len(await worker.client.tokens(worker.client.request())) == 16


async def test_report_says_that_the_engine_is_away() -> None:
    async with run_worker(sim_load_s=0.3) as worker:
        os.kill(engines_of()[0], signal.SIGKILL)
        away = await worker.client.report_when(lambda r: r.models[0].free_sequences == 0)
        assert away.models[0].state == 2
        with pytest.raises(CallError) as full:
            await worker.client.tokens(worker.client.request())
        assert full.value.reason == "WORKER_FULL"
        assert "loading" in worker.app.readiness()
        await worker.ready()
        assert worker.app.readiness() == ""


async def test_deadline_of_the_request_ends_it_though_the_call_has_longer() -> None:
    async with run_worker() as worker:
        request = worker.client.request(max_new_tokens=FOREVER)
        soon = str(int(time.time() * 1000) + 200)
        with pytest.raises(CallError) as late:
            await worker.client.messages(request, timeout=20, x_loom_deadline_unix_ms=soon)
        assert late.value.reason == "DEADLINE_EXCEEDED"
        await worker.client.report_when(running(0))
        with pytest.raises(CallError, match="before it arrived"):
            await worker.client.messages(request, x_loom_deadline_unix_ms="1000")


async def test_call_deadline_frees_the_slot() -> None:
    async with run_worker() as worker:
        with pytest.raises(CallError) as late:
            await worker.client.messages(worker.client.request(max_new_tokens=FOREVER), timeout=0.2)
        assert late.value.reason == "DEADLINE_EXCEEDED"
        await worker.client.report_when(lambda r: not r.active_request_ids and r.models[0].running == 0)


async def test_drain_refuses_new_and_lets_the_running_end() -> None:
    async with run_worker(sim_step_ms=5) as worker:
        call = worker.client.start(worker.client.request(max_new_tokens=100))
        first = await call.read()
        drain = worker.client.stub.Drain(worker_pb2.DrainRequest(grace_ms=20_000))
        await worker.client.report_when(lambda r: r.draining)
        with pytest.raises(CallError) as refused:
            await worker.client.tokens(worker.client.request("late"))
        assert (refused.value.reason, refused.value.code) == ("DRAINING", grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(CallError, match="is draining; send the request to another") as not_loaded:
            await worker.client.load("sha256:" + "e" * 64)
        assert not_loaded.value.reason == "DRAINING"
        tokens = sum(len(m.tokens.token_ids) for m in [first, *await read(call)])
        assert tokens == 100
        assert (await drain).remaining == 0


async def test_drain_hands_back_what_outlasts_its_grace() -> None:
    async with run_worker(sequences_max=1) as worker:
        call = await start_endless(worker)
        waits = asyncio.create_task(worker.client.tokens(worker.client.request("waits"), lease=False))
        await worker.client.report_when(lambda r: r.models[0].waiting == 1)
        drained = await worker.client.stub.Drain(worker_pb2.DrainRequest(grace_ms=50))
        assert drained.remaining == 1
        for ended in (read(call), waits):
            with pytest.raises(CallError) as handed_back:
                await ended
            assert handed_back.value.reason == "DRAINING"


async def test_slow_reader_gets_every_token_in_few_messages() -> None:
    async with run_worker(sim_step_ms=0) as worker:
        call = worker.client.start(worker.client.request(max_new_tokens=FOREVER, prompt_token_ids=[1] * 10))
        first = await call.read()
        await worker.client.report_when(lambda r: r.models[0].running == 0)
        rest = await read(call)
        tokens = len(first.tokens.token_ids) + sum(len(m.tokens.token_ids) for m in rest)
        assert tokens == FOREVER


async def test_reader_that_stopped_reading_and_leaves_frees_its_slot() -> None:
    async with run_worker(sim_step_ms=0.5) as worker:
        request = worker.client.request(max_new_tokens=FOREVER, logprobs=True, top_logprobs=20)
        call = worker.client.start(request)
        await call.read()
        # Its flow-control window is full long before this many tokens.
        await worker.client.report_when(lambda r: generated(r) > 2000)
        call.cancel()
        freed = await worker.client.report_when(lambda r: not r.active_request_ids)
        assert freed.models[0].free_sequences == 64
        assert 2000 < generated(await worker.client.report_when(lambda _: True)) < FOREVER


async def test_many_requests_at_once_all_end() -> None:
    async with run_worker(sequences_max=256, unleased_queue_max=2000, sim_step_ms=1) as worker:
        asked = [
            worker.client.tokens(worker.client.request(f"r{n}", max_new_tokens=4), lease=False, timeout=60)
            for n in range(1400)
        ]
        assert {len(tokens) for tokens in await asyncio.gather(*asked)} == {4}
        report = await worker.client.report_when(lambda r: not r.active_request_ids)
        assert report.models[0].free_blocks == report.models[0].total_blocks
