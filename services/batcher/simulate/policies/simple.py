"""Policies that look at no prompt: random, round robin, and least request."""

from __future__ import annotations

from random import Random

from services.batcher.core.messages import Request
from services.batcher.simulate.policies.base import Immediate


class RandomChoice(Immediate):
    """Any worker."""

    def __init__(self, workers: int, random: Random) -> None:
        super().__init__(workers)
        self._random = random

    def choose(self, request: Request, now: float) -> int:
        return self._random.randrange(len(self.inflight))


class RoundRobin(Immediate):
    """One after the other."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._last = -1

    def choose(self, request: Request, now: float) -> int:
        self._last = (self._last + 1) % len(self.inflight)
        return self._last


class LeastRequest(Immediate):
    """The worker with the fewest requests in flight, of all; among equals any.

    Envoy's own LEAST_REQUEST compares two random ones: this is its better form, of full knowledge.
    """

    def __init__(self, workers: int, random: Random) -> None:
        super().__init__(workers)
        self._random = random

    def choose(self, request: Request, now: float) -> int:
        fewest = min(self.inflight)
        return self._random.choice([w for w, count in enumerate(self.inflight) if count == fewest])
