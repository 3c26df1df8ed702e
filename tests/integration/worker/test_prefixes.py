"""What load reports say of the prefix cache, through a real front and a sim engine's process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing

from loom.worker.v1 import worker_pb2

from tests.integration.worker.harness import VERSION, Running, run_worker
from tests.integration.worker.processes import engines_of
from tokenloom.contract.prefix import block_hashes, root_hash, wire_hashes


def wire(prompt: list[int], salt: str = "") -> set[int]:
    """What a gateway would send along with this prompt."""
    return set(wire_hashes(block_hashes(prompt, root_hash(VERSION, salt))))


async def run(worker: Running, prompt: list[int], salt: str = "") -> None:
    request = worker.client.request(prompt_token_ids=prompt, cache_salt=salt, max_new_tokens=1)
    await worker.client.tokens(request)


class Follower:
    """One subscription and what it knows."""

    def __init__(self, reports: AsyncIterator[worker_pb2.LoadReport]) -> None:
        self._reports = reports
        self.known: set[int] = set()
        self.wholes = 0

    async def next(self) -> worker_pb2.PrefixChanges | None:
        model = (await anext(self._reports)).models[0]
        if not model.HasField("prefix"):
            return None
        told = model.prefix
        if told.whole:
            self.known, self.wholes = set(), self.wholes + 1
        self.known = (self.known | set(told.stored)) - set(told.evicted)
        return told

    async def until(self, known: set[int]) -> None:
        async with asyncio.timeout(20):
            while self.known != known:
                await self.next()


async def test_listeners_follow_what_the_cache_gains_and_loses() -> None:
    one, two = [7] * 1100, [8] * 1600
    # 69 blocks and 100 of 140: the second prompt evicts the end of the first.
    async with (
        run_worker(kv_cache_bytes=140 * 16 * 1024, heartbeat_ms=20) as worker,
        aclosing(worker.client.reports()) as reports,
    ):
        follower = Follower(reports)
        first = await follower.next()
        assert first is not None
        assert (first.whole, list(first.stored)) == (True, [])
        await run(worker, one)
        await follower.until(wire(one))
        await run(worker, two)
        left = wire(two) | {hashed for hashed in wire(one) if hashed in wire([7] * 512)}
        await follower.until(left)
        assert len(wire(one)) == 2
        assert len(left) == 4
        async with aclosing(worker.client.reports()) as more:
            late = Follower(more)
            whole = await late.next()
            assert whole is not None
            assert (whole.whole, set(whole.stored)) == (True, left)
        assert follower.wholes == 1


async def test_prefixes_of_another_salt_have_other_names() -> None:
    prompt = [9] * 600
    async with run_worker() as worker:
        await run(worker, prompt, "salt")
        report = await worker.client.report_when(lambda _: True)
        assert set(report.models[0].prefix.stored) == wire(prompt, "salt") != wire(prompt)


async def test_an_engine_that_was_killed_begins_with_nothing() -> None:
    prompt = [7] * 1100
    async with run_worker(heartbeat_ms=20) as worker, aclosing(worker.client.reports()) as reports:
        follower = Follower(reports)
        await run(worker, prompt)
        await follower.until(wire(prompt))
        [pid] = engines_of()
        os.kill(pid, signal.SIGKILL)
        await follower.until(set())
        assert follower.wholes > 1
        await worker.ready()
        await run(worker, prompt)
        await follower.until(wire(prompt))


async def test_blocks_of_another_size_are_not_told() -> None:
    async with run_worker(block_tokens=32) as worker:
        await run(worker, [7] * 1100)
        report = await worker.client.report_when(lambda r: r.models[0].cached_blocks > 0)
        assert not report.models[0].prefix.stored
