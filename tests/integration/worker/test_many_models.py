"""Many models on one worker's budget, by rpc: real engine processes that pretend to hold weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loom.worker.v1 import worker_pb2
from structlog.testing import CapturingLogger

from services.worker.front import models
from tests.integration.worker.harness import FakeModelStore, Running, digest_of, run_worker
from tests.integration.worker.processes import engines_of, until
from tokenloom.kit.errors import CallError

NAMES = ("one", "two", "three", "four")
VERSION = {name: f"sha256:{str(number) * 64}" for number, name in enumerate(NAMES)}
READY, DRAINING = worker_pb2.MODEL_STATE_READY, worker_pb2.MODEL_STATE_DRAINING


@asynccontextmanager
async def worker_for(count: int, **settings: object) -> AsyncIterator[Running]:
    """One whose budget holds so many of the four models, each of 1,000 bytes; nothing is configured."""
    store = FakeModelStore()
    for name, version in VERSION.items():
        store.add_sim(name, version, weight_bytes=1000)
    values = {"models": "", "memory_bytes": count * 1000 + 500, "min_dwell_s": 0.0, **settings}
    async with run_worker(store, **values) as worker:
        yield worker


async def use(worker: Running, name: str) -> None:
    request = worker.client.request(model_version=VERSION[name], max_new_tokens=2)
    assert len(await worker.client.tokens(request)) == 2


async def load(worker: Running, name: str, *, evict: bool = True) -> worker_pb2.ResidentModel:
    """As somebody does who waits for it: asks again when told to, and uses it at once."""
    while True:
        try:
            model = await worker.client.load(VERSION[name], evict=evict)
        except CallError as error:
            if error.reason != "MODEL_MEMORY_BUSY":
                raise
            await asyncio.sleep(error.retry_after_s or 0.0)
        else:
            await use(worker, name)
            return model


async def report(worker: Running) -> worker_pb2.LoadReport:
    return await worker.client.report_when(lambda report: True)


async def test_budget_is_told_before_anything_is_loaded() -> None:
    async with worker_for(2) as worker:
        assert worker.app.readiness() == ""
        told = await report(worker)
        assert (told.memory_budget_bytes, told.free_memory_bytes, told.loads_on_demand) == (2500, 2500, True)
        assert list(told.models) == []


async def test_least_recently_used_model_leaves_for_one_that_is_asked_for() -> None:
    async with worker_for(2) as worker:
        await load(worker, "one")
        await load(worker, "two")
        await use(worker, "one")
        model = await load(worker, "three")
        assert (model.state, model.memory_bytes) == (READY, 1000)
        told = await report(worker)
        assert {one.name: one.memory_bytes for one in told.models} == {"one": 1000, "three": 1000}
        assert told.free_memory_bytes == 500
        assert len(engines_of()) == 2


async def test_reservations_and_processes_never_exceed_the_budget_in_any_report() -> None:
    async with worker_for(2, report_interval_ms=1) as worker, aclosing(worker.client.reports()) as reports:

        async def watch() -> int:
            count = 0
            async for told in reports:
                reserved = sum(model.memory_bytes for model in told.models)
                assert reserved + told.free_memory_bytes <= told.memory_budget_bytes
                assert len(engines_of()) <= 2
                count += 1
            return count

        watching = asyncio.create_task(watch())
        for name in (*NAMES, *NAMES):
            await load(worker, name)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching


async def test_present_sequences_end_before_their_model_leaves() -> None:
    async with worker_for(1, sim_step_ms=5) as worker:
        await load(worker, "one")
        call = worker.client.start(worker.client.request(model_version=VERSION["one"], max_new_tokens=80))
        count = len((await call.read()).tokens.token_ids)
        loading = asyncio.create_task(load(worker, "two"))
        told = await worker.client.report_when(
            lambda r: any(model.state == DRAINING for model in r.models) and len(r.models) == 2
        )
        states = {model.name: (model.state, model.memory_bytes) for model in told.models}
        assert states["one"] == (DRAINING, 1000)
        assert states["two"][0] in (worker_pb2.MODEL_STATE_FETCHING, worker_pb2.MODEL_STATE_LOADING)
        assert states["two"][1] == 0
        with pytest.raises(CallError, match="is draining") as refused:
            await use(worker, "one")
        assert refused.value.reason == "WORKER_FULL"
        while (message := await call.read()) is not grpc.aio.EOF:
            count += len(message.tokens.token_ids)
        assert count == 80
        assert (await loading).state == READY


async def test_sequence_that_outlasts_the_grace_is_handed_back_as_retriable() -> None:
    async with worker_for(1, evict_grace_s=0.1) as worker:
        await load(worker, "one")
        endless = worker.client.request(model_version=VERSION["one"], max_new_tokens=8000)
        running = asyncio.create_task(worker.client.messages(endless))
        await worker.client.report_when(lambda r: r.models[0].running == 1)
        assert (await load(worker, "two")).state == READY
        with pytest.raises(CallError, match="leaves worker") as back:
            await running
        assert (back.value.reason, back.value.retriable) == ("DRAINING", True)
        assert back.value.code is grpc.StatusCode.UNAVAILABLE


async def test_model_inside_its_dwell_stays_unless_an_operator_unloads_it() -> None:
    async with worker_for(1, min_dwell_s=500.0) as worker:
        model = await load(worker, "one")
        assert 0 < model.dwell_left_ms <= 500_000
        with pytest.raises(CallError) as refused:
            await worker.client.load(VERSION["two"], evict=True)
        assert refused.value.reason == "MODEL_MEMORY_BUSY"
        assert 400 < (refused.value.retry_after_s or 0.0) <= 500
        assert refused.value.metadata == {"needed_bytes": "1000", "free_bytes": "500", "budget_bytes": "1500"}
        await worker.client.unload(VERSION["one"])
        assert (await worker.client.load(VERSION["two"])).state == READY


async def test_idle_time_of_a_model_is_told_with_the_heartbeat() -> None:
    async with worker_for(1, heartbeat_ms=30) as worker:
        await load(worker, "one")
        await worker.client.report_when(lambda r: r.models[0].idle_ms >= 100)
        call = worker.client.start(worker.client.request(model_version=VERSION["one"], max_new_tokens=8000))
        await call.read()
        told = await worker.client.report_when(lambda r: r.models[0].running == 1)
        assert told.models[0].idle_ms == 0
        call.cancel()


async def test_fifty_loads_at_once_start_one_engine() -> None:
    async with worker_for(1, sim_load_s=0.2) as worker:
        models = await asyncio.gather(*(worker.client.load(VERSION["one"], evict=True) for _ in range(50)))
        assert [model.state for model in models] == [READY] * 50
        assert len(engines_of()) == 1
        assert worker.app._worker.models.get(VERSION["one"]).engine.restarts == 0


async def test_several_loads_wait_for_memory_in_their_order_and_all_get_it() -> None:
    async with worker_for(2) as worker:
        for name in ("one", "two"):
            await load(worker, name)
        three, four = await asyncio.gather(load(worker, "three"), load(worker, "four"))
        assert {three.state, four.state} == {READY}
        assert {model.name for model in (await report(worker)).models} == {"three", "four"}


async def test_engine_that_is_killed_keeps_its_memory() -> None:
    async with worker_for(1, sim_load_s=0.3) as worker:
        await load(worker, "one")
        os.kill(engines_of()[0], signal.SIGKILL)
        told = await worker.client.report_when(lambda r: r.models[0].state != READY)
        assert (told.models[0].memory_bytes, told.free_memory_bytes) == (1000, 500)
        await worker.client.report_when(lambda r: r.models[0].state == READY)


async def test_failed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = {"engine": "torch", "cache_dir": str(tmp_path), "failed_keep_s": 0.5, "memory_bytes": 1 << 40}
    async with worker_for(1, **settings) as worker:
        file = {"path": "model.safetensors", "digest": digest_of(b"absent"), "size_bytes": 6}
        worker.store.models["one"].manifest.files.add(**file)
        for _ in range(2):
            with pytest.raises(CallError, match="cannot fetch") as failed:
                await worker.client.load(VERSION["one"], evict=True)
            assert failed.value.reason == "MODEL_LOAD_FAILED"
            told = await worker.client.report_when(lambda r: r.free_memory_bytes == 1 << 40)
            assert [model.state for model in told.models] == [worker_pb2.MODEL_STATE_FAILED]
        assert worker.app.readiness() == ""
        await worker.client.report_when(lambda r: not r.models)
        assert engines_of() == []


async def test_worker_whose_model_can_never_fit_is_not_ready_and_says_why_with_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(models, "log", log)
    why = (
        "model one needs 1,000 bytes (weights 1,000 bytes) and this worker has 500 bytes in all: "
        "raise memory_bytes, or lower kv_cache_bytes"
    )
    async with worker_for(0, models="one", ready=False) as worker:
        await until(lambda: worker.app.readiness() == f"failed: model one: {why}")
        health = health_pb2_grpc.HealthStub(worker.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        said = [call for call in log.calls if call.args == ("model not to be had",)]
        assert len(said) == 1, "tried again and again, told once"
        assert said[0].method_name == "error"
        assert why in said[0].kwargs["why"]
