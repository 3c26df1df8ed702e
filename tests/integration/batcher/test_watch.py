"""Streams of load reports: workers that discovery finds, loses and cannot find, and streams that break."""

import asyncio
from contextlib import asynccontextmanager

from loom.worker.v1 import worker_pb2

from services.batcher.adapters.watch import GrpcFleetWatch
from tests.integration.batcher.harness import MODEL, PATIENCE_S, FakeWorker

INTERVAL_S = 0.02


class Directory:
    """A discovery that says what the test tells it."""

    def __init__(self):
        self.known = frozenset()
        self.error = None
        self.asked = asyncio.Event()

    async def endpoints(self):
        self.asked.set()
        if self.error is not None:
            raise self.error
        return self.known


class Listener:
    """Everything that a driver would be told."""

    def __init__(self):
        self.events = []
        self.reports = []
        self.fail_once = None
        self._changed = asyncio.Condition()

    def found(self, endpoint):
        self.events.append(("found", endpoint))

    def reported(self, endpoint, report):
        if self.fail_once is not None:
            error, self.fail_once = self.fail_once, None
            raise error
        if ("up", endpoint) not in self.events[-1:]:
            self.events.append(("up", endpoint))
        self.reports.append(report)

    def lost(self, endpoint):
        self.events.append(("lost", endpoint))

    def removed(self, endpoint):
        self.events.append(("removed", endpoint))

    async def saw(self, *wanted):
        async with asyncio.timeout(PATIENCE_S):
            while self.events[-len(wanted) :] != list(wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def watching():
    fake = await FakeWorker().start()
    await fake.say(1)
    directory, listener = Directory(), Listener()
    directory.known = frozenset({fake.endpoint})
    watch = GrpcFleetWatch(directory, "test", INTERVAL_S)
    watch.start(listener)
    try:
        yield fake, directory, listener, watch
    finally:
        await watch.close()
        await fake.stop()


async def test_a_discovered_worker_is_listened_to_and_let_go_when_it_is_gone():
    async with watching() as (fake, directory, listener, watch):
        await listener.saw(("found", fake.endpoint), ("up", fake.endpoint))
        assert watch.discovered
        assert listener.reports[0].models[0].version == MODEL
        directory.known = frozenset()
        await listener.saw(("lost", fake.endpoint), ("removed", fake.endpoint))


async def test_known_workers_stay_while_discovery_does_not_answer():
    async with watching() as (fake, directory, listener, _):
        await listener.saw(("found", fake.endpoint), ("up", fake.endpoint))
        directory.error = OSError("resolver away")
        for _ in range(3):
            directory.asked.clear()
            await directory.asked.wait()
        assert listener.events[-1] == ("up", fake.endpoint)


async def test_a_stream_that_breaks_is_opened_again():
    async with watching() as (fake, _, listener, _):
        await listener.saw(("up", fake.endpoint))
        await fake.stop()
        await listener.saw(("lost", fake.endpoint))
        await fake.start()
        await listener.saw(("lost", fake.endpoint), ("up", fake.endpoint))


async def test_a_report_that_cannot_be_taken_in_ends_the_stream_not_the_watch():
    async with watching() as (fake, _, listener, _):
        await listener.saw(("up", fake.endpoint))
        listener.fail_once = RuntimeError("a defect")
        await listener.saw(("lost", fake.endpoint), ("up", fake.endpoint))


async def test_a_peer_that_sends_no_reports_is_tried_again(monkeypatch):
    tries = asyncio.Queue()

    async def garbage(self, request, call):
        tries.put_nowait(None)
        yield worker_pb2.LoadModelRequest(version="\x01 is no report")

    async with watching() as (fake, _, listener, _):
        await listener.saw(("up", fake.endpoint))
        await fake.stop()
        monkeypatch.setattr(FakeWorker, "WatchLoad", garbage)
        await fake.start()
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                await tries.get()
        assert listener.events[-1] == ("lost", fake.endpoint)
        await fake.stop()
        monkeypatch.undo()
        await fake.start()
        await listener.saw(("lost", fake.endpoint), ("up", fake.endpoint))


async def test_nobody_is_called_after_close():
    async with watching() as (fake, _, listener, watch):
        await listener.saw(("up", fake.endpoint))
        await watch.close()
        before = list(listener.events)
        await fake.say(5)
        await asyncio.sleep(0.05)
        assert listener.events == before
