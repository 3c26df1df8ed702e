"""What each tenant has waiting and running here, and what it was served: counters for people; the fair
order has accounts of its own (`flows.py`). Bounded: the tenants idle for longest are forgotten first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.batcher.core.messages import Usage


class Tenant:
    """One tenant's counters."""

    __slots__ = ("cached_tokens", "generated_tokens", "name", "prompt_tokens", "queued", "running", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.queued = 0
        self.running = 0
        self.prompt_tokens = 0
        """Those that no cache held."""
        self.cached_tokens = 0
        self.generated_tokens = 0


class Tenants:
    """All tenants with work, and at most `tenants_max` in all while some are idle."""

    def __init__(self, tenants_max: int, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._tenants_max = tenants_max
        self._busy: dict[str, Tenant] = {}
        self._idle: dict[str, Tenant] = {}
        """Longest idle first."""

    def __iter__(self) -> Iterator[Tenant]:
        yield from self._busy.values()
        yield from self._idle.values()

    def queued(self, name: str) -> None:
        """A request waits."""
        tenant = self._busy.get(name)
        if tenant is None:
            known = self._idle.pop(name, None)
            tenant = known or Tenant(name, self._weights.get(name, 1.0))
            self._busy[name] = tenant
        tenant.queued += 1

    def left(self, name: str) -> None:
        """A waiting request went without being placed."""
        tenant = self._busy[name]
        tenant.queued -= 1
        self._settle(tenant)

    def placed(self, name: str) -> None:
        """A waiting request went to a worker."""
        tenant = self._busy[name]
        tenant.queued -= 1
        tenant.running += 1

    def ended(self, name: str, usage: Usage | None) -> None:
        """A placed request ended."""
        tenant = self._busy[name]
        tenant.running -= 1
        if usage is not None:
            tenant.prompt_tokens += usage.prompt_tokens - usage.cached_prompt_tokens
            tenant.cached_tokens += usage.cached_prompt_tokens
            tenant.generated_tokens += usage.completion_tokens
        self._settle(tenant)

    def _settle(self, tenant: Tenant) -> None:
        if tenant.queued or tenant.running:
            return
        self._idle[tenant.name] = self._busy.pop(tenant.name)
        while self._idle and len(self._busy) + len(self._idle) > self._tenants_max:
            del self._idle[next(iter(self._idle))]
