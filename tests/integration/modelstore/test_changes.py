"""Several modelstores on one store, killed at any moment: no change is lost, and nobody's blobs."""

import asyncio
import json
import os
import random
import signal
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from statistics import median

import grpc
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from services.modelstore.adapters.objects import FolderObjects
from services.modelstore.core.aliases import Target
from services.modelstore.core.manifest import blob_path
from services.modelstore.store import Store
from tests.integration.modelstore.conftest import running
from tests.integration.modelstore.test_process import READY_S, environment
from tokenloom.kit.channels import open_channel
from tokenloom.kit.clock import SystemClock

CHANGES = 200
KILLS = 10
WRITERS = 4
SEEN_S = 30.0


@asynccontextmanager
async def process(store):
    """A modelstore process on a port that it chooses, and a client; killed at the end if it still runs."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.modelstore",
        env=environment(store, store, 0),
        stderr=asyncio.subprocess.PIPE,
    )
    listening = None
    try:
        async with asyncio.timeout(READY_S):
            port = await _told_port(started.stderr)
        listening = asyncio.create_task(started.stderr.read())
        channel = open_channel(f"127.0.0.1:{port}")
        yield started, rpc.ModelStoreServiceStub(channel)
        await channel.close(None)
    finally:
        with suppress(ProcessLookupError):
            started.kill()
        await started.wait()
        if listening is not None:
            await listening


async def _told_port(log):
    said = []
    async for line in log:
        said.append(line.decode())
        event = json.loads(line)
        if event["event"] == "modelstore serves":
            return event["port"]
    raise AssertionError(f"the process ended: {said}")


@pytest.fixture
async def sim(tmp_path):
    """A store folder with the built-in model in it; its version."""
    async with running(tmp_path / "store", "") as house:
        imported, _ = await house.import_model("builtin:sim", "sim", aliases=["canary"])
    return imported.version


def change(version, weight):
    """A change that can be told from every other."""
    target = pb.AliasTarget(digest=version.digest, weight=weight)
    return pb.SetAliasRequest(model="sim", alias="stable", targets=[target])


async def history(stub):
    """Oldest first."""
    request = pb.ListAliasHistoryRequest(model="sim", alias="stable", limit=1000)
    return list(reversed((await stub.ListAliasHistory(request, timeout=60)).changes))


def by_sequence(changes):
    return sorted(changes, key=lambda alias: alias.sequence)


async def test_two_stores_on_one_folder_racing_200_changes_make_one_line(tmp_path, sim):
    stores = [Store(FolderObjects(tmp_path / "store"), SystemClock()) for _ in range(2)]
    for store in stores:
        await store.refresh()

    async def set_alias(number):
        return await stores[number % 2].set_alias("sim", "stable", [Target(sim.digest, number + 1)], None)

    states = await asyncio.gather(*map(set_alias, range(CHANGES)))
    for store in stores:
        found = await store.alias_history("sim", "stable", 1000)
        assert [state.sequence for state in found] == list(range(CHANGES, 0, -1))
        assert found == sorted(states, key=lambda state: state.sequence, reverse=True)


async def test_two_processes_racing_200_changes_make_one_line(tmp_path, sim):
    async with AsyncExitStack() as stack:
        stubs = [(await stack.enter_async_context(process(tmp_path / "store")))[1] for _ in range(2)]

        async def set_alias(number):
            return (await stubs[number % 2].SetAlias(change(sim, number + 1), timeout=60)).alias

        changes = await asyncio.gather(*map(set_alias, range(CHANGES)))
        for stub in stubs:
            found = await history(stub)
            assert [alias.sequence for alias in found] == list(range(1, CHANGES + 1))
            assert found == by_sequence(changes)


class Writers:
    """Calls of one process until it is gone; what was acknowledged, and what was under way at the end."""

    def __init__(self, stub, version, marks, first):
        self._stub = stub
        self._version = version
        self._next = first
        self.alias_changes = []
        self.marks = list(marks)
        self.under_way = set()

    async def change_aliases(self):
        while True:
            self._next += 1
            weight = self._next
            self.under_way.add(weight)
            self.alias_changes.append((await self._stub.SetAlias(change(self._version, weight))).alias)
            self.under_way.remove(weight)

    async def mark(self):
        while True:
            self._next += 1
            message = str(self._next)
            request = pb.SetDeprecationRequest(digest=self._version.digest, deprecated=True, message=message)
            self.under_way.add(message)
            await self._stub.SetDeprecation(request)
            self.under_way.remove(message)
            self.marks.append(message)

    async def until_killed(self, victim, acknowledged):
        """Kill it in the middle of whatever it does after so many changes."""
        work = [asyncio.create_task(self.change_aliases()) for _ in range(WRITERS)]
        work.append(asyncio.create_task(self.mark()))
        while len(self.alias_changes) < acknowledged:
            await asyncio.wait(work, timeout=0.001, return_when=asyncio.FIRST_COMPLETED)
        victim.send_signal(signal.SIGKILL)
        endings = await asyncio.gather(*work, return_exceptions=True)
        assert {type(ending) for ending in endings} == {grpc.aio.AioRpcError}


async def test_kills_in_the_middle_of_changes_lose_nothing_that_was_acknowledged(tmp_path, sim):
    draw = random.Random(6)
    known, writers, mark = [], None, ""
    for kill in range(KILLS + 1):
        async with process(tmp_path / "store") as (victim, stub):
            found = await history(stub) if kill else []
            assert [alias.sequence for alias in found] == list(range(1, len(found) + 1))
            if writers is not None:
                assert_nothing_was_lost(known, writers, found)
                (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
                assert {alias.name: alias for alias in model.aliases}["stable"] == found[-1]
                mark = model.versions[0].deprecation.message
                assert mark in {writers.marks[-1], *writers.under_way}
                events = [event async for event in stub.Verify(pb.VerifyRequest())]
                assert events[-1].verified.damaged == 0
            if kill < KILLS:
                known, writers = found, Writers(stub, sim, [mark], first=1000 * kill)
                await writers.until_killed(victim, draw.randrange(1, 30))


def assert_nothing_was_lost(known, writers, found):
    """What was there before and what was acknowledged, each once; beside it, only what was under way."""
    acknowledged = {alias.sequence: alias for alias in [*known, *writers.alias_changes]}
    assert len(acknowledged) == len(known) + len(writers.alias_changes)
    besides = [alias for alias in found if alias != acknowledged.get(alias.sequence)]
    assert len(found) - len(besides) == len(acknowledged)
    weights = [alias.targets[0].weight for alias in besides]
    assert len(set(weights)) == len(weights)
    assert set(weights) <= writers.under_way


async def test_a_watcher_sees_what_another_process_changed_within_a_second(tmp_path, sim):
    async with AsyncExitStack() as stack:
        store, seen_after_s = tmp_path / "store", []
        house = await stack.enter_async_context(running(store, "", POLL_INTERVAL_MS="400"))
        _, stub = await stack.enter_async_context(process(store))
        watching = house.stub.WatchModels(pb.WatchModelsRequest())
        await watching.read()
        for number in range(1, 6):
            changed = (await stub.SetAlias(change(sim, number), timeout=60)).alias
            begun_s = time.monotonic()
            async with asyncio.timeout(SEEN_S):
                while changed not in (await watching.read()).models[0].aliases:
                    pass
            seen_after_s.append(time.monotonic() - begun_s)
        watching.cancel()
    assert median(seen_after_s) < 1


async def test_a_collection_beside_an_import_that_stands_still_takes_nothing_of_it(tmp_path, monkeypatch):
    """The import has stored some of its blobs, and no manifest names them yet."""
    stands_still, may_go_on = asyncio.Event(), asyncio.Event()
    put, stored = FolderObjects.put, []

    async def gated(self, path, data):
        if path.startswith("blobs/") and len(stored) == 2:
            stands_still.set()
            await may_go_on.wait()
        await put(self, path, data)
        if path.startswith("blobs/"):
            stored.append(path)

    monkeypatch.setattr(FolderObjects, "put", gated)
    store = tmp_path / "store"
    async with running(store, "") as importing, running(store, "") as collecting:
        running_import = asyncio.create_task(importing.import_model("builtin:sim", "sim"))
        await asyncio.wait_for(stands_still.wait(), SEEN_S)
        orphan = store / blob_path("sha256:" + "0" * 64)
        orphan.write_bytes(b"orphan")
        for path in (*(store / name for name in stored), orphan):
            os.utime(path, (1, 1))
        done = await collecting.call("CollectGarbage", pb.CollectGarbageRequest(min_age_ms=1))
        assert [file.path for file in done.deleted] == [blob_path("sha256:" + "0" * 64)]
        assert (done.kept_blobs, done.spared_blobs) == (0, 2)
        may_go_on.set()
        imported, _ = await running_import
        assert imported.created
        events = [event async for event in collecting.stub.Verify(pb.VerifyRequest())]
        assert (events[-1].verified.versions, events[-1].verified.damaged) == (1, 0)
        assert list((store / "pins").iterdir()) == []
