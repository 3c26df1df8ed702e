"""A crowd at the batcher through the real Envoy: everybody is served, and nobody goes past it."""

import asyncio

from tests.integration.batcher.swarm import BYPASSED, WAVE
from tests.integration.batcher.test_envoy import behind_envoy
from tokenloom.contract import headers as names

CROWD = 1_400


async def test_1400_held_at_once_are_all_served_and_none_past_the_batcher(tmp_path):
    async with behind_envoy(tmp_path, workers=2, free=0) as (made, generate, envoy):
        calls = []
        while len(calls) < CROWD:
            calls += [generate(f"r{len(calls) + n}", tenant=f"tenant-{n % 10}") for n in range(WAVE)]
            wanted = len(calls)
            await made.until(lambda state, wanted=wanted: sum(q.depth for q in state.queues) == wanted)
        for worker in made.workers:
            await worker.say(CROWD)
        answers = await asyncio.gather(*(_tokens(call) for call in calls))
        state = await made.until(lambda state: state.counters.completed == CROWD)
        assert answers == [[7]] * CROWD
        leases = [call[names.LEASE] for worker in made.workers for call in worker.calls]
        assert len(leases) == len(set(leases)) == CROWD
        assert (state.counters.dispatched, state.counters.served_elsewhere, state.lease_count) == (
            CROWD,
            0,
            0,
        )
        assert await envoy.stat(BYPASSED) == 0


async def _tokens(call):
    return [token async for response in call for token in response.tokens.token_ids]
