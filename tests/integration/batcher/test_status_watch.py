"""`tokenloom status --watch` beside a real batcher process: frames, its end, a batcher that comes back."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from tests.integration.batcher.harness import (
    MODEL,
    Exchange,
    FakeWorker,
    http_headers,
    picked,
    request_headers,
)
from tests.integration.batcher.test_process import ROOT, WAIT_S, finish, free_port, start
from tokenloom.cli import local, state
from tokenloom.kit.channels import open_channel

LAUNCHER_PID = os.getpid()


class Watched:
    """What the command needs to find: a batcher process, its worker, and a launcher that lives."""

    def __init__(self, home, worker, port):
        self.home = home
        self.worker = worker
        self.port = port
        self.batcher = None
        self._lock = state.lock(local.lock_file())

    async def begin(self):
        self._lock.__enter__()
        ports = {"grpc": self.port, "metrics": free_port()}
        process = state.Process("batcher", LAUNCHER_PID, ports, state.READY)
        state.write(
            local.state_file(),
            state.Mesh(LAUNCHER_PID, "127.0.0.1:1", "sim", ["sim"], "", 0, [process]),
        )
        await self.start_batcher()

    async def start_batcher(self):
        workers = self.worker.endpoint
        self.batcher = await start(port=self.port, health_port=0, metrics_port=free_port(), workers=workers)
        async with asyncio.timeout(WAIT_S):
            while b'"serving"' not in (line := await self.batcher.stderr.readline()):
                assert line

    def launcher_dies(self):
        self._lock.__exit__(None, None, None)
        self._lock = None

    async def end(self):
        if self._lock is not None:
            self.launcher_dies()
        await stop(self.batcher)

    @asynccontextmanager
    async def command(self, *options):
        """`tokenloom status --watch …`, killed at the end unless it ended itself."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tokenloom.cli", "status", "--watch", "--interval", "0.02", *options),
            env=dict(os.environ, TOKENLOOM_HOME=str(self.home), PYTHONPATH=paths),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        try:
            yield process
        finally:
            await stop(process)


async def stop(process):
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def read(process, wanted):
    """Lines of a command's output until one is `wanted`; that one."""
    async with asyncio.timeout(WAIT_S):
        while line := (await process.stdout.readline()).decode():
            if wanted(line):
                return line
    raise AssertionError((await process.stderr.read()).decode())


async def read_state(process, wanted):
    """The first state that is `wanted`."""
    line = await read(process, lambda line: wanted(json.loads(line)["state"]))
    return json.loads(line)["state"]


@pytest.fixture
async def watched(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    worker = await FakeWorker().start()
    await worker.say(1)
    made = Watched(tmp_path, worker, free_port())
    try:
        await made.begin()
        yield made
    finally:
        await made.end()
        await worker.stop()


@asynccontextmanager
async def running_and_waiting(watched):
    """One request of acme that runs, and a batch one that waits behind it."""
    channel = open_channel(f"127.0.0.1:{watched.port}")
    try:
        runs = Exchange(channel)
        await runs.send(request_headers=http_headers(request_headers("runs", tenant="acme")))
        picked(await runs.answer())
        waits = Exchange(channel)
        await waits.send(request_headers=http_headers(request_headers("waits", tenant="zeta", priority=3)))
        await waits.until_held()
        yield
    finally:
        await channel.close(None)


async def test_frames_for_programs_follow_what_the_batcher_does_until_it_is_interrupted(watched):
    async with watched.command("--json") as command:
        idle = await read_state(command, lambda seen: any(each["alive"] for each in seen["workers"]))
        assert (idle["lease_count"], idle["queues"]) == (0, [])
        async with running_and_waiting(watched):
            busy = await read_state(
                command, lambda seen: any(each["depth"] and each["running"] for each in seen["queues"])
            )
        (queue,), (worker,), (lease,) = busy["queues"], busy["workers"], busy["leases"]
        assert (queue["model_version"], queue["running"]) == (MODEL, 1)
        assert queue["depth_by_priority"] == {"batch": 1}
        assert queue["flows"][0]["tenant"] == "zeta"
        assert (worker["endpoint"], worker["leases"]) == (watched.worker.endpoint, 1)
        assert (lease["request_id"], lease["tenant"]) == ("runs", "acme")
        await read_state(command, lambda seen: not seen["queues"])
        command.send_signal(signal.SIGINT)
        status, said = await finish(command)
    assert (status, said) == (0, "")


async def test_frames_for_people_name_bands_tenants_and_workers(watched):
    async with watched.command() as command, running_and_waiting(watched):
        await read(command, lambda line: "1 waiting (batch 1; " in line and "1 running" in line)
        await read(command, lambda line: line.split()[:3] == [MODEL[7:19], "all", "1"])
        for name in ("acme", "zeta", watched.worker.endpoint, "runs"):
            await read(command, lambda line, name=name: line.startswith(name))
        # And a second one.
        await read(command, lambda line: "arrived 2" in line)


async def test_a_mesh_that_goes_away_ends_the_command_with_the_cure(watched):
    async with watched.command() as command:
        await read(command, lambda line: "1 of 1 workers alive" in line)
        watched.launcher_dies()
        watched.batcher.send_signal(signal.SIGTERM)
        status, said = await finish(command)
    assert status == 1
    assert "the mesh went away" in said
    assert "`tokenloom up`" in said
    assert len(said.strip().splitlines()) == 1


async def test_a_batcher_that_is_started_again_is_watched_on(watched):
    async with watched.command("--json") as command:
        async with running_and_waiting(watched):
            await read_state(command, lambda seen: seen["counters"]["arrived"] == 2)
        await stop(watched.batcher)
        await watched.start_batcher()
        await read_state(command, lambda seen: seen["counters"]["arrived"] == 0)
        assert command.returncode is None


async def test_plain_status_says_what_the_batcher_holds(watched):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
    async with running_and_waiting(watched):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tokenloom.cli", "status"),
            env=dict(os.environ, TOKENLOOM_HOME=str(watched.home), PYTHONPATH=paths, COLUMNS="200"),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(WAIT_S):
            out, _ = await process.communicate()
    last = out.decode().splitlines()[-1]
    assert last.startswith("batcher: 1 waiting (batch 1; the oldest for ")
    assert last.endswith("), 1 running, 1 of 1 workers alive")
