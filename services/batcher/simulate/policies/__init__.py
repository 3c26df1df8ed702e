"""The policies by name: ours, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from services.batcher.core.messages import Limits
from services.batcher.simulate.law import Profile
from services.batcher.simulate.policies.affinity import PrefixOnly
from services.batcher.simulate.policies.base import Policy
from services.batcher.simulate.policies.dynamo import Dynamo
from services.batcher.simulate.policies.scorers import Gaie, LlmD
from services.batcher.simulate.policies.simple import LeastRequest, RandomChoice, RoundRobin
from services.batcher.simulate.policies.tokenloom import Tokenloom

Make = Callable[[int, Profile, Limits, Random], Policy]


def _dynamo(workers: int, profile: Profile, random: Random) -> Policy:
    return Dynamo(workers, random, block_tokens=profile.block_tokens, step_tokens_max=profile.step_tokens_max)


POLICIES: dict[str, Make] = {
    "tokenloom": lambda workers, profile, limits, random: Tokenloom(workers, limits),
    "random": lambda workers, profile, limits, random: RandomChoice(workers, random),
    "round_robin": lambda workers, profile, limits, random: RoundRobin(workers),
    "least_request": lambda workers, profile, limits, random: LeastRequest(workers, random),
    "prefix_only": lambda workers, profile, limits, random: PrefixOnly(workers),
    "gaie": lambda workers, profile, limits, random: Gaie(workers, random, profile.kv_tokens),
    "llm_d": lambda workers, profile, limits, random: LlmD(workers, random),
    "dynamo": lambda workers, profile, limits, random: _dynamo(workers, profile, random),
}
"""Each makes a policy for so many workers of a profile."""
