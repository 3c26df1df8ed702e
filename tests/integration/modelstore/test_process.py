"""The modelstore as a process of its own: settings, signals, kill -9 in the middle of an import."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from tests.integration.modelstore import made
from tokenloom.kit.channels import open_channel

READY_S = 90
ENDS_S = 60


def environment(store, sources, port):
    names = {
        "PORT": str(port),
        "METRICS_PORT": "0",
        "STORE_DIR": str(store),
        "IMPORT_ROOTS": str(sources),
        "POLL_INTERVAL_MS": "50",
    }
    settings = {f"TOKENLOOM_MODELSTORE_{key}": value for key, value in names.items()}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def start(store, sources, port):
    command = [sys.executable, "-m", "services.modelstore"]
    return subprocess.Popen(command, env=environment(store, sources, port), stderr=subprocess.PIPE)


@asynccontextmanager
async def process(store, sources, port):
    """A modelstore process that serves, and a client; killed at the end if it still runs."""
    running = start(store, sources, port)
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        await asyncio.wait_for(channel.channel_ready(), READY_S)
        yield running, rpc.ModelStoreServiceStub(channel)
    finally:
        await channel.close(None)
        running.kill()
        running.communicate()


@pytest.fixture
def sources(tmp_path):
    made.hf_folder(tmp_path / "sources" / "tiny")
    return tmp_path / "sources"


def children(pid):
    """The kernel lists children by the thread that started them, and any thread may have."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


async def started_child(pid):
    """The progress is told before the process is there."""
    for _ in range(100 * ENDS_S):
        if found := children(pid):
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"process {pid} started no other within {ENDS_S} s")


async def names(stub):
    return [model.name for model in (await stub.ListModels(pb.ListModelsRequest())).models]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
async def test_a_modelstore_killed_while_it_imports_comes_back_with_the_old_state(
    tmp_path, sources, unused_port
):
    store = tmp_path / "store"
    request = pb.ImportModelRequest(source=str(sources / "tiny"), name="tiny")
    async with process(store, sources, unused_port) as (running, stub):
        async for _ in stub.ImportModel(pb.ImportModelRequest(source="builtin:sim", name="sim")):
            pass
        importing = stub.ImportModel(request)
        async for response in importing:
            if response.progress.stage == "convert":
                break
        converters = [os.pidfd_open(pid) for pid in await started_child(running.pid)]
        assert len(converters) == 1
        running.send_signal(signal.SIGKILL)
        running.wait(ENDS_S)
        # The converter sees its parent's end and follows.
        ended, _, _ = await asyncio.to_thread(select.select, converters, [], [], ENDS_S)
        assert ended == converters
        os.close(converters[0])
    assert any((store / ".scratch").iterdir())

    async with process(store, sources, unused_port) as (running, stub):
        assert await names(stub) == ["sim"]
        events = [response async for response in stub.ImportModel(request)]
        assert events[-1].imported.created
        assert await names(stub) == ["sim", "tiny"]
        # What the first one left was swept.
        assert list((store / ".scratch").iterdir()) == []
        running.terminate()
        assert await asyncio.to_thread(running.wait, ENDS_S) == 0


async def test_a_cancelled_import_ends_its_converter(tmp_path, sources, unused_port):
    async with process(tmp_path / "store", sources, unused_port) as (running, stub):
        importing = stub.ImportModel(pb.ImportModelRequest(source=str(sources / "tiny"), name="tiny"))
        async for response in importing:
            if response.progress.stage == "convert":
                break
        converters = [os.pidfd_open(pid) for pid in await started_child(running.pid)]
        importing.cancel()
        ended, _, _ = await asyncio.to_thread(select.select, converters, [], [], ENDS_S)
        assert ended == converters
        assert await names(stub) == []


async def test_sigterm_ends_a_process_with_watchers_at_once_and_well(tmp_path, sources, unused_port):
    async with process(tmp_path / "store", sources, unused_port) as (running, stub):
        watching = stub.WatchModels(pb.WatchModelsRequest())
        await watching.read()
        running.terminate()
        assert await asyncio.to_thread(running.wait, ENDS_S) == 0


def test_bad_settings_are_refused_together_and_in_words(tmp_path):
    environ = environment(tmp_path / "store", "relative", 0) | {"TOKENLOOM_MODELSTORE_STOREDIR": "/x"}
    command = [sys.executable, "-m", "services.modelstore"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=READY_S, check=False)
    assert ended.returncode == 78
    assert "'relative' is not absolute" in ended.stderr
    assert "TOKENLOOM_MODELSTORE_STOREDIR: no such setting" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_port_in_use_is_one_line(tmp_path, sources, unused_port):
    async with process(tmp_path / "store", sources, unused_port):
        command = [sys.executable, "-m", "services.modelstore"]
        environ = environment(tmp_path / "other", sources, unused_port)
        second = await asyncio.to_thread(
            subprocess.run, command, env=environ, capture_output=True, text=True, timeout=READY_S, check=False
        )
    assert second.returncode == 1
    assert "is the port in use?" in second.stderr
    assert "Traceback" not in second.stderr


async def test_requests_of_garbage_are_the_callers_mistake(tmp_path, sources, unused_port):
    async with process(tmp_path / "store", sources, unused_port) as (_, stub):
        channel = open_channel(f"127.0.0.1:{unused_port}")
        resolve = channel.unary_unary("/loom.modelstore.v1.ModelStoreService/ResolveModel")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resolve(b"\xff\xff\xff", timeout=5)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        await channel.close(None)
        assert await names(stub) == []
