"""Making models resident: at start, by rpc, with failing stores, engines and blobs."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from loom.worker.v1 import worker_pb2

from services.worker.adapters import store as store_adapter
from services.worker.adapters.process import ProcessLaunch
from services.worker.adapters.store import GrpcModelStore
from services.worker.adapters.weights import WeightCache
from services.worker.front.ports import FileRef, ModelVersion
from services.worker.protocol import Event, Failed, encode
from tests.integration.worker.harness import (
    VERSION,
    FakeModelStore,
    Running,
    digest_of,
    run_worker,
    serve_store,
)
from tests.integration.worker.processes import engines_of, is_running, until
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError

OTHER = f"sha256:{'c' * 64}"
DATA = bytes(range(256)) * 40


async def load(worker: Running, version: str) -> worker_pb2.ResidentModel:
    return await worker.client.load(version)


async def unload(worker: Running, version: str) -> None:
    await worker.client.unload(version)


async def test_model_of_the_settings_is_awaited_until_the_store_has_it() -> None:
    store = FakeModelStore()
    async with run_worker(store, ready=False, resolve_backoff_max_s=0.05) as worker:
        await until(lambda: "no model sim" in worker.app.readiness())
        assert worker.app.readiness().startswith("model sim:")
        store.add_sim()
        await worker.ready()
        assert len(await worker.client.tokens(worker.client.request())) == 16


async def test_engine_process_that_ends_at_once_says_why() -> None:
    launch = ProcessLaunch("m", lambda folder: ["-c", "import sys; sys.exit('out of luck')"])
    link = await launch("", lambda event: None)
    assert await asyncio.wait_for(link.ended, 10) == "exit status 1: out of luck"


async def test_what_an_engine_said_last_is_heard_though_the_front_was_busy_when_it_ended() -> None:
    frame = encode(Failed("MODEL_UNSUPPORTED", "an odd layer"))
    code = f"import os, sys; os.write(int(sys.argv[2]), {frame!r}); os._exit(1)"
    heard: list[Event] = []
    link = await ProcessLaunch("busy", lambda folder: ["-c", code])("", heard.append)
    # The loop stands still until the process is gone and the thread that buries it has said so.
    for thread in threading.enumerate():
        if thread.name == "wait busy":
            thread.join()
    assert await asyncio.wait_for(link.ended, 10) == "exit status 1"
    assert heard == [Failed("MODEL_UNSUPPORTED", "an odd layer")]


async def test_engine_that_nobody_can_watch_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="can't start new thread"):
        await ProcessLaunch("m", lambda folder: ["-c", "import time; time.sleep(60)"])("", lambda event: None)
    assert not engines_of(kind="time.sleep(60)")


async def test_engine_that_speaks_another_protocol_is_killed() -> None:
    code = "import os, sys, time; os.write(int(sys.argv[2]), b'GET / HTTP/1.1' * 9); time.sleep(60)"
    link = await ProcessLaunch("m", lambda folder: ["-c", code])("", lambda event: None)
    assert "another protocol" in await asyncio.wait_for(link.ended, 10)
    assert not is_running(link.pid)


async def test_engine_that_closed_its_socket_but_lives_on_is_killed() -> None:
    code = "import os, sys, time; os.close(int(sys.argv[2])); time.sleep(60)"
    link = await ProcessLaunch("m", lambda folder: ["-c", code])("", lambda event: None)
    assert await asyncio.wait_for(link.ended, 10) == "killed by SIGKILL"


async def test_absent_store_is_named_and_awaited() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
        async with run_worker(ready=False, modelstore_target=target) as worker:
            await until(lambda: f"the modelstore at {target} cannot be reached" in worker.app.readiness())


async def test_model_is_loaded_and_unloaded_by_rpc() -> None:
    store = FakeModelStore()
    store.add_sim()
    store.add_sim("other", OTHER, context_length=100)
    async with run_worker(store) as worker:
        both = await asyncio.gather(load(worker, OTHER), load(worker, OTHER))
        assert [model.state for model in both] == [worker_pb2.MODEL_STATE_READY] * 2
        assert len(engines_of()) == 2
        request = worker.client.request(model_version=OTHER)
        assert len(await worker.client.tokens(request)) == 16
        await unload(worker, OTHER)
        assert len(engines_of()) == 1
        with pytest.raises(CallError) as gone:
            await worker.client.tokens(request)
        assert gone.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(CallError) as unknown:
            await unload(worker, OTHER)
        assert unknown.value.reason == "MODEL_NOT_FOUND"
        listed = await worker.client.stub.ListModels(worker_pb2.ListModelsRequest())
        assert [model.version for model in listed.models] == [VERSION]


async def test_unload_lets_the_running_sequence_end_and_takes_no_new_one() -> None:
    async with run_worker(sim_step_ms=5) as worker:
        call = worker.client.start(worker.client.request(max_new_tokens=60))
        count = len((await call.read()).tokens.token_ids)
        unloading = asyncio.create_task(unload(worker, VERSION))
        await worker.client.report_when(lambda r: r.models[0].state == worker_pb2.MODEL_STATE_DRAINING)
        with pytest.raises(CallError) as refused:
            await worker.client.tokens(worker.client.request("late"))
        assert refused.value.reason == "WORKER_FULL"
        while (message := await call.read()) is not grpc.aio.EOF:
            count += len(message.tokens.token_ids)
        assert count == 60
        await unloading
        assert engines_of() == []


async def test_unknown_version_cannot_be_loaded() -> None:
    async with run_worker() as worker:
        with pytest.raises(CallError) as unknown:
            await load(worker, OTHER)
        assert unknown.value.reason == "MODEL_NOT_FOUND"


async def test_models_max_bounds_what_is_resident() -> None:
    store = FakeModelStore()
    store.add_sim()
    store.add_sim("other", OTHER)
    async with run_worker(store, models_max=1) as worker:
        with pytest.raises(CallError, match="unload a model first") as full:
            await load(worker, OTHER)
        assert full.value.reason == "MODEL_MEMORY_BUSY"
        assert full.value.retry_after_s is not None


async def test_engine_that_cannot_load_fails_the_model_with_one_line(tmp_path: Path) -> None:
    store = FakeModelStore()
    store.add_sim()
    settings = {"engine": "torch", "cache_dir": str(tmp_path), "load_attempts_max": 1}
    async with run_worker(store, ready=False, **settings) as worker:
        report = await worker.client.report_when(
            lambda r: any(m.state == worker_pb2.MODEL_STATE_FAILED for m in r.models)
        )
        assert report.models[0].error
        assert "\n" not in report.models[0].error
        assert "failed" in worker.app.readiness()


@asynccontextmanager
async def cache_of(store: FakeModelStore, cache_dir: Path) -> AsyncIterator[WeightCache]:
    async with serve_store(store) as target:
        channel = open_channel(target)
        try:
            yield WeightCache(cache_dir, GrpcModelStore(channel, target), attempts_max=3)
        finally:
            await channel.close(None)


def version_of(*files: tuple[str, bytes]) -> ModelVersion:
    refs = tuple(FileRef(path, digest_of(data), len(data)) for path, data in files)
    return ModelVersion(VERSION, "m", 128, 512, files=refs)


async def test_store_that_brings_no_configuration_is_named_within_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent(FakeModelStore):
        async def FetchBlob(self, request: object, call: object) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

    monkeypatch.setattr(store_adapter, "ASK_TIMEOUT_S", 0.05)
    store = Silent()
    store.add_sim()
    store.models["sim"].manifest.files.add(path="config.json", digest=digest_of(b"{}"), size_bytes=2)
    async with serve_store(store) as target:
        channel = open_channel(target)
        with pytest.raises(CallError) as silent:
            await asyncio.wait_for(GrpcModelStore(channel, target).get_version(VERSION), 10)
        await channel.close(None)
    assert silent.value.message == f"the modelstore at {target} brings no config.json within 0.05 s"
    assert (silent.value.reason, silent.value.retriable) == ("SERVICE_UNAVAILABLE", True)


async def test_files_are_fetched_once_and_laid_out(tmp_path: Path) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA, digest_of(b"{}"): b"{}"})
    version = version_of(("model.safetensors", DATA), ("sub/config.json", b"{}"))
    heard: list[float] = []
    async with cache_of(store, tmp_path) as cache:
        folder = Path(await cache.folder(version, heard.append))
        assert await cache.folder(version, heard.append) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == DATA
    assert (folder / "sub/config.json").read_bytes() == b"{}"
    assert len(store.fetches) == 2
    assert heard[-1] == 1.0
    assert sorted(heard[: len(heard) // 2]) == heard[: len(heard) // 2]


async def test_two_workers_of_one_node_fetch_once(tmp_path: Path) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    version = version_of(("model.safetensors", DATA))
    async with cache_of(store, tmp_path) as one, cache_of(store, tmp_path) as two:
        folders = await asyncio.gather(*(c.folder(version, lambda _: None) for c in (one, two)))
    assert folders[0] == folders[1]
    assert len(store.fetches) == 1


async def test_broken_stream_goes_on_at_its_offset(tmp_path: Path) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    store.serve = lambda digest, offset, before: DATA[offset : offset + 3000] if before < 2 else DATA[offset:]
    async with cache_of(store, tmp_path) as cache:
        folder = await cache.folder(version_of(("w", DATA)), lambda _: None)
    assert (Path(folder) / "w").read_bytes() == DATA
    assert [offset for _, offset in store.fetches] == [0, 3000, 6000]


async def test_corrupted_blob_is_thrown_away_and_fetched_again(tmp_path: Path) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    store.serve = lambda digest, offset, before: b"x" * len(DATA) if before == 0 else DATA[offset:]
    async with cache_of(store, tmp_path) as cache:
        folder = await cache.folder(version_of(("w", DATA)), lambda _: None)
    assert (Path(folder) / "w").read_bytes() == DATA
    assert [offset for _, offset in store.fetches] == [0, 0]


@pytest.mark.parametrize("spoilt", [b"x" * len(DATA), DATA + b"more"])
async def test_blob_that_stays_corrupted_is_a_digest_mismatch(tmp_path: Path, spoilt: bytes) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    store.serve = lambda digest, offset, before: spoilt
    async with cache_of(store, tmp_path) as cache:
        with pytest.raises(CallError) as wrong:
            await cache.folder(version_of(("w", DATA)), lambda _: None)
    assert wrong.value.reason == "DIGEST_MISMATCH"
    assert wrong.value.metadata["digest"] == digest_of(DATA)
    assert len(store.fetches) == 3
    assert [path.suffix for path in (tmp_path / "blobs/sha256").iterdir()] == [".lock"]


async def test_missing_blob_fails_at_once(tmp_path: Path) -> None:
    store = FakeModelStore()
    async with cache_of(store, tmp_path) as cache:
        with pytest.raises(CallError, match="cannot fetch w") as missing:
            await cache.folder(version_of(("w", DATA)), lambda _: None)
    assert missing.value.reason == "MODEL_LOAD_FAILED"
    assert len(store.fetches) == 1


@pytest.mark.parametrize("path", ["../w", "/etc/passwd", "", "a/../../b", "."])
async def test_path_outside_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    async with cache_of(store, tmp_path) as cache:
        with pytest.raises(CallError, match="no relative path"):
            await cache.folder(version_of((path, DATA)), lambda _: None)
    assert not store.fetches


async def test_corrupted_model_is_reported_as_failed_and_the_worker_serves_on(tmp_path: Path) -> None:
    store = FakeModelStore(blobs={digest_of(DATA): DATA})
    store.add_sim()
    manifest = store.models["sim"].manifest
    manifest.files.add(path="w", digest=digest_of(DATA), size_bytes=len(DATA))
    store.serve = lambda digest, offset, before: b"x" * len(DATA)
    settings = {"engine": "torch", "cache_dir": str(tmp_path), "fetch_attempts_max": 1}
    async with run_worker(store, ready=False, **settings) as worker:
        with pytest.raises(CallError) as wrong:
            await load(worker, VERSION)
        assert wrong.value.reason == "DIGEST_MISMATCH"
        report = await worker.client.report_when(lambda r: True)
        assert report.models[0].state == worker_pb2.MODEL_STATE_FAILED
        assert "digest" in report.models[0].error
