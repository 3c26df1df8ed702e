"""The real worker process: SIGTERM, SIGKILL, a port in use, refused settings."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tests.integration.worker.harness import Client, FakeModelStore, serve_store
from tests.integration.worker.processes import engines_of, is_running, libraries_of, until
from tokenloom.kit.channels import open_channel

REPOSITORY = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def spawn(**settings: str) -> asyncio.subprocess.Process:
    ours = {f"TOKENLOOM_WORKER_{name.upper()}": value for name, value in settings.items()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TOKENLOOM_")}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "gen")])
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        env={**kept, **ours, "PYTHONPATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@asynccontextmanager
async def worker_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    store = FakeModelStore()
    store.add_sim()
    port = free_port()
    async with serve_store(store) as target:
        process = await spawn(
            port=str(port),
            metrics_port="0",
            engine="sim",
            models="sim",
            modelstore_target=target,
            sim_step_ms="5",
            drain_grace_s="10",
        )
        channel = open_channel(f"127.0.0.1:{port}")
        try:
            async with asyncio.timeout(20):
                await channel.channel_ready()
            client = Client(channel)
            await client.report_when(lambda r: any(m.state == 3 for m in r.models))
            yield process, client
        finally:
            await channel.close(None)
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def test_sigterm_lets_running_sequences_end_and_exits_with_0() -> None:
    async with worker_process() as (process, client):
        call = client.start(client.request(max_new_tokens=80))
        count = len((await call.read()).tokens.token_ids)
        engines = engines_of(process.pid)
        assert len(engines) == 1
        for pid in (process.pid, *engines):
            assert "libtorch" not in libraries_of(pid)
        process.send_signal(signal.SIGTERM)
        while (message := await call.read()) is not grpc.aio.EOF:
            count += len(message.tokens.token_ids)
        assert count == 80
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await until(lambda: not any(is_running(pid) for pid in engines))


async def test_engine_ends_when_its_front_is_killed() -> None:
    async with worker_process() as (process, client):
        call = client.start(client.request(max_new_tokens=8000))
        await call.read()
        engines = engines_of(process.pid)
        assert engines
        process.kill()
        await until(lambda: not any(is_running(pid) for pid in engines))
        call.cancel()


async def test_port_in_use_is_one_line_and_no_traceback() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await spawn(port=str(taken.getsockname()[1]), metrics_port="0", engine="sim")
        output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"is the port in use?" in output
    assert b"Traceback" not in output


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "cuda"}, "ENGINE"),
        ({"host": "0.0.0.0"}, "advertise must be set"),
        ({"models": "two words"}, "no name"),
        ({"sequences_max": "1000", "step_tokens_max": "10"}, "step_tokens_max"),
        ({"modle": "x"}, "no such setting"),
    ],
)
async def test_wrong_settings_are_refused(settings: dict[str, str], said: str) -> None:
    process = await spawn(**settings)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 78
    assert said in output.decode()
    assert b"Traceback" not in output
