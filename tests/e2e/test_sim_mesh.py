"""The mesh under load and under fire, with sim workers: every process is real, only the model is not."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
from loom.batcher.v1 import batcher_pb2, batcher_pb2_grpc

from tests.e2e.client import connected, greedy
from tests.e2e.mesh import eventually, until
from tokenloom.kit.channels import open_channel


def failures(answers):
    return [a.error for a in answers if a.error is not None]


class Batcher:
    """The batcher's own view of the mesh."""

    def __init__(self, stub):
        self._stub = stub

    async def state(self):
        return (await self._stub.GetState(batcher_pb2.GetStateRequest())).state

    async def idle(self):
        state = await self.state()
        running = sum(m.running + m.waiting for w in state.workers for m in w.models)
        return state.lease_count == 0 and running == 0 and not any(q.depth for q in state.queues)


@asynccontextmanager
async def batcher_of(mesh):
    channel = open_channel(f"127.0.0.1:{mesh.port_of('batcher', 'grpc')}")
    try:
        yield Batcher(batcher_pb2_grpc.BatcherServiceStub(channel))
    finally:
        await channel.close(None)


@pytest.fixture
async def batcher(sim_mesh):
    sim_mesh.ready()
    async with batcher_of(sim_mesh) as batcher:
        yield batcher


async def test_a_prompt_is_answered_token_by_token(sim_mesh):
    async with connected(sim_mesh.target) as client:
        first, second = await client.generate_all([greedy("hello", 20, "sim")] * 2)
    assert failures([first, second]) == []
    assert len(first.token_ids) == len(second.token_ids) == 20
    assert first.deltas >= 18
    assert first.finished.usage.completion_tokens == 20
    assert first.started.model_version.startswith("sim@sha256:")


async def test_a_prompt_that_its_worker_knows_is_reported_as_cached(sim_mesh):
    request = greedy([(n * n + n) % 250 for n in range(200)], 4, "sim")
    async with connected(sim_mesh.target) as client:
        answers = [await client.generate(request) for _ in range(8)]
    assert failures(answers) == []
    assert [a.started.cached_prompt_tokens for a in answers] == [
        a.finished.usage.cached_prompt_tokens for a in answers
    ]
    assert {a.finished.usage.cached_prompt_tokens for a in answers} == {0, 192}


async def test_1400_requests_held_at_once_all_pass_the_batcher(sim_mesh, batcher):
    before = (await batcher.state()).counters
    async with connected(sim_mesh.target, 4) as client:
        answers = await client.generate_all([greedy("hello", 8, "sim")] * 1400)
    assert failures(answers) == []
    assert {len(a.token_ids) for a in answers} == {8}
    after = (await batcher.state()).counters
    assert after.dispatched - before.dispatched >= 1400
    assert after.served_elsewhere == before.served_elsewhere
    assert sim_mesh.envoy_stat("failure_mode_allowed") == 0
    await eventually(batcher.idle, "every lease ended")


async def test_a_caller_who_leaves_frees_the_slot(sim_mesh, batcher):
    async with connected(sim_mesh.target) as client:
        calls = [client.stub().Generate(greedy("hello", 30_000, "sim")) for _ in range(16)]
        for call in calls:
            await call.read()
        assert (await batcher.state()).lease_count >= 16
        for call in calls:
            call.cancel()
        assert await eventually(batcher.idle, "every slot is free again")


async def test_no_request_fails_when_the_batcher_is_killed_under_load(sim_mesh, batcher):
    pid = sim_mesh.pid("batcher")
    async with connected(sim_mesh.target, 2) as client:
        load = [asyncio.create_task(client.generate(greedy("hello", 60, "sim"))) for _ in range(300)]
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        load += [asyncio.create_task(client.generate(greedy("again", 20, "sim"))) for _ in range(100)]
        answers = await asyncio.gather(*load)
    assert failures(answers) == []
    assert [len(a.token_ids) for a in answers] == [60] * 300 + [20] * 100
    until(lambda: sim_mesh.pid("batcher") != pid, "the batcher was started again")


async def test_no_request_fails_when_a_worker_is_killed_before_its_first_token(sim_mesh, batcher):
    pid = sim_mesh.pid("worker-0")
    # Long prompts: the first token is far away when the worker dies, and the others wait for their turn.
    requests = [greedy("hello " * 2000, 5, "sim") for _ in range(12)]

    async def all_busy():
        return all(worker.leases for worker in (await batcher.state()).workers)

    async with connected(sim_mesh.target) as client:
        load = [asyncio.create_task(client.generate(r)) for r in requests]
        await eventually(all_busy, "every worker has a prompt")
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*load)
    assert failures(answers) == []
    assert {len(a.token_ids) for a in answers} == {5}


async def test_a_stream_goes_on_elsewhere_when_its_worker_is_killed(sim_mesh, batcher):
    pid = sim_mesh.pid("worker-1")
    requests = [greedy("hello", 150, "sim") for _ in range(8)]
    for request in requests:
        request.sampling.seed = 7
    async with connected(sim_mesh.target) as client:
        (expected,) = await client.generate_all(requests[:1])
        load = [asyncio.create_task(client.generate(r)) for r in requests]
        await asyncio.sleep(0.4)
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*load)
    assert failures(answers) == []
    assert all(a.token_ids == expected.token_ids and a.text == expected.text for a in answers)
