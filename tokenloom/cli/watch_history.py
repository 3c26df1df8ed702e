"""What can be said of one batcher replica only by comparing its states: rates, and shares of service.

Bound: `SAMPLES_MAX` samples of the tenants' accounts, at most one a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from loom.batcher.v1 import batcher_pb2 as pb

from services.batcher.core.flows import OUTPUT_COST, PROMPT_COST

SAMPLE_MS = 1_000
SAMPLES_MAX = 31
"""Shares of service are those of the last half minute."""


class Sample(NamedTuple):
    """What each tenant was served since the replica's start, as the fair order counts it."""

    unix_ms: int
    served: Mapping[str, float]


class Share(NamedTuple):
    """One tenant beside the others, 0 to 1. None: nothing was served, or it does not take part."""

    of_service: float | None
    of_weight: float | None


def service(tenant: pb.Tenant) -> float:
    """Tokens computed for it, at the fair order's costs."""
    return PROMPT_COST * tenant.served_prompt_tokens + OUTPUT_COST * tenant.served_generated_tokens


class History:
    """The latest state, and what the earlier ones say about it."""

    def __init__(self, state: pb.State) -> None:
        self.state = state
        self._before: pb.State | None = None
        self._tokens_before: dict[str, int] = {}
        self._samples: deque[Sample] = deque([_sample(state)], maxlen=SAMPLES_MAX)

    def add(self, state: pb.State) -> None:
        """A newer state. A replica that was started again has no history."""
        before, self.state = self.state, state
        if state.counters.arrived < before.counters.arrived or state.unix_ms <= before.unix_ms:
            self._before = None
            self._samples.clear()
        else:
            self._before = before
            self._tokens_before = {tenant.name: tokens(tenant) for tenant in before.tenants}
        if not self._samples or state.unix_ms - self._samples[-1].unix_ms >= SAMPLE_MS:
            self._samples.append(_sample(state))

    def rate(self, counter: Callable[[pb.State], int]) -> float | None:
        """How fast a counter grew since the state before; None for the first state."""
        if self._before is None:
            return None
        return (counter(self.state) - counter(self._before)) / self._passed_s()

    def tokens_per_s(self, tenant: pb.Tenant) -> float | None:
        """Tokens computed for those of its requests that ended since the state before."""
        if self._before is None:
            return None
        grown = tokens(tenant) - self._tokens_before.get(tenant.name, 0)
        return max(grown, 0) / self._passed_s()

    def shares(self) -> dict[str, Share]:
        """Every tenant's part of what was served lately, beside its part of the weights.

        Lately: since the oldest sample; in the first state, since the replica's start. The weights are
        those of tenants that have work or were served.
        """
        base = self._samples[0].served if self._before is not None else {}
        grown = {t.name: max(service(t) - base.get(t.name, 0.0), 0.0) for t in self.state.tenants}
        taking = {t.name: t.weight for t in self.state.tenants if t.queued or t.running or grown[t.name]}
        served, weights = sum(grown.values()), sum(taking.values())
        return {
            name: Share(
                grown[name] / served if served else None,
                taking[name] / weights if name in taking and weights else None,
            )
            for name in grown
        }

    def _passed_s(self) -> float:
        before = self._before.unix_ms if self._before is not None else 0
        return (self.state.unix_ms - before) / 1000


def tokens(tenant: pb.Tenant) -> int:
    """Tokens computed for its ended requests: prompts, where no cache held them, and what was generated."""
    return tenant.served_prompt_tokens + tenant.served_generated_tokens


def _sample(state: pb.State) -> Sample:
    return Sample(state.unix_ms, {tenant.name: service(tenant) for tenant in state.tenants})
