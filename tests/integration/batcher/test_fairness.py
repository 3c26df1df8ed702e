"""Who is served next, with real workers behind the real Envoy. Orders are looked at, never times."""

from collections import Counter

import pytest

from tests.integration.batcher.swarm import BATCH, BYPASSED, INTERACTIVE, house

SHAPE = {"prompt": 32, "new": 8}
"""All alike, so that requests count as tokens do; long enough that reports come while they run."""


def jain(values):
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


async def served_first(home, counts, first):
    """How many of the first so many served were each tenant's; all waited before any was served."""
    # The greedy ones come first: it must not matter.
    tenants = sorted(counts, key=counts.get, reverse=True)
    async with home.plugged():
        tasks = await home.queue([(tenant, SHAPE) for tenant in tenants for _ in range(counts[tenant])])
    served = Counter(await home.first(first, tasks))
    assert all(served[tenant] < count for tenant, count in counts.items()), "one had nothing waiting"
    assert await home.envoy.stat(BYPASSED) == 0
    return served


async def test_a_tenant_with_ten_times_the_requests_is_served_no_more_than_the_others(tmp_path):
    counts = {f"tenant-{n}": 30 for n in range(5)} | {"greedy": 300}
    async with house(tmp_path, places=12) as home:
        served = await served_first(home, counts, 120)
    assert jain([served[tenant] for tenant in counts]) >= 0.98, served


async def test_tenants_are_served_by_their_weights(tmp_path):
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    async with house(tmp_path, places=14, tenant_weights=weights) as home:
        served = await served_first(home, {"one": 60, "two": 80, "four": 100}, 140)
    assert [served[tenant] for tenant in weights] == pytest.approx([20, 40, 80], abs=8), served


async def test_those_within_their_share_do_not_wait_behind_a_flood(tmp_path):
    async with house(tmp_path, places=1) as home:
        async with home.plugged():
            tasks = await home.queue([("flood", SHAPE)] * 150)
            tasks += await home.queue([(f"calm-{n}", SHAPE) for n in range(5)])
        # One of the flood's may go before them: it was there when they came, and all stand alike.
        assert Counter(await home.first(6, tasks))["flood"] == 1


async def test_an_interactive_request_behind_500_queued_batch_ones_starts_next(tmp_path):
    async with house(tmp_path, places=1) as home:
        async with home.plugged():
            tasks = await home.queue([("batch", {"priority": BATCH, "new": 1})] * 500)
            tasks += await home.queue([("person", {"priority": INTERACTIVE, "new": 1})])
        assert await home.first(1, tasks) == ["person"]
        assert await home.envoy.stat(BYPASSED) == 0
