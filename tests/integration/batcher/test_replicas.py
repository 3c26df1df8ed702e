"""Several batchers beside each other, and one that comes back: all they know comes from workers' reports."""

import time
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from services.batcher.app import BatcherApp
from services.batcher.settings import BatcherSettings
from tests.integration.batcher.harness import MODEL, FakeWorker, Mesh, picked
from tokenloom.kit.clock import SystemClock

HELD = 9
"""Prefixes in each worker's cache."""


@asynccontextmanager
async def replica(fakes, name):
    listed = ",".join(fake.endpoint for fake in fakes)
    settings = BatcherSettings(port=0, health_port=0, workers=listed, name=name)
    app = BatcherApp(settings, CollectorRegistry())
    await app.start()
    made = Mesh(app, fakes)
    try:
        yield made
    finally:
        await made.channel.close(None)
        await app.close()


@asynccontextmanager
async def workers(count, free):
    fakes = [await FakeWorker().start() for _ in range(count)]
    for number, fake in enumerate(fakes):
        await fake.say(free, active=[f"before-{number}"])
        model = fake.report.models[0]
        model.prefix.whole = True
        model.prefix.stored.extend(1000 * number + depth for depth in range(HELD))
        model.served.add(tenant="greedy", priority=2, prompt_tokens=10_000, generated_tokens=10_000)
    try:
        yield fakes
    finally:
        for fake in fakes:
            await fake.stop()


async def test_a_replica_that_comes_back_knows_the_fleet_from_its_first_reports():
    async with workers(20, free=2) as fakes:
        async with replica(fakes, "first") as first:
            await first.until(lambda state: sum(each.alive for each in state.workers) == len(fakes))
        begun = time.monotonic()
        async with replica(fakes, "again") as again:
            state = await again.until(lambda state: sum(each.alive for each in state.workers) == len(fakes))
            took_s = time.monotonic() - begun
            assert [w.models[0].free_sequences for w in state.workers] == [2] * len(fakes)
            assert [w.models[0].known_prefixes for w in state.workers] == [HELD] * len(fakes)
            # It goes where the prefix is, which no request that this replica saw has told it.
            exchange = await again.open("a", prefix=(3000, 3001, 3002), prompt_tokens=1600)
            assert picked(await exchange.answer())[0] == fakes[3].endpoint
            await exchange.end()
        print(f"knew the fleet after {took_s:.3f} s")


async def test_two_replicas_order_by_first_arrival_each():
    async with workers(1, free=0) as fakes, replica(fakes, "one") as one, replica(fakes, "two") as two:
        deadline = SystemClock().unix_ms() + 60_000
        held = {}
        for mesh in (one, two):
            for name, arrival in (("late", 3000), ("early", 1000), ("middle", 2000)):
                held[mesh, name] = await mesh.hold(name, arrival_unix_ms=arrival, deadline_unix_ms=deadline)
        for name in ("early", "middle", "late"):
            await fakes[0].say(1)
            for mesh in (one, two):
                picked(await held[mesh, name].answer())
                assert [lease.request_id for lease in (await mesh.state()).leases] == [name]
            await fakes[0].say(0, active=[name])
            for mesh in (one, two):
                await held[mesh, name].end()


async def test_a_replica_charges_what_others_sent():
    async with workers(1, free=0) as fakes, replica(fakes, "one") as one:
        (fake,) = fakes
        await one.until(lambda state: bool(state.workers) and state.workers[0].alive)
        exchanges = {name: await one.hold(name, tenant=name) for name in ("greedy", "modest")}
        # Another replica had much computed for one of them meanwhile.
        await fake.say(0)
        fake.report.models[0].served.add(
            tenant="greedy", priority=2, prompt_tokens=90_000, generated_tokens=90_000
        )
        state = await one.until(
            lambda state: any(flow.virtual_tokens > 0 for queue in state.queues for flow in queue.flows)
        )
        (queue,) = state.queues
        assert queue.model_version == MODEL
        assert max(queue.flows, key=lambda flow: flow.virtual_tokens).tenant == "greedy"
        await fake.say(1)
        picked(await exchanges["modest"].answer())
        await exchanges["modest"].end()
        picked(await exchanges["greedy"].answer())
        await exchanges["greedy"].end()
