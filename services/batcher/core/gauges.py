"""What meters show of the core: a few numbers, summed over all models, so that they need no label for one.

It walks queues, pools and tenants with work, and copies nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

from services.batcher.core.fleet import Fleet
from services.batcher.core.ledger import Ledger
from services.batcher.core.messages import PRIORITY_LAST
from services.batcher.core.snapshot import oldest_by_band


class BandGauges(NamedTuple):
    """One priority band of all queues."""

    depth: int
    prompt_tokens: int
    oldest_wait_s: float
    estimated_wait_s: float
    """Until everybody now waiting in it or above is placed, at the present pace; of the slowest model."""


class Gauges(NamedTuple):
    """One replica at one moment."""

    bands: tuple[BandGauges, ...]
    """The most urgent first."""
    ready: int
    """(worker, model) pairs that serve."""
    open: int
    """Those of them that can take a request now."""
    tenants: tuple[tuple[str, int, int], ...]
    """(name, queued, running) of those with work."""
    promoted: int
    placed_tokens: int
    """Prompt tokens of everything dispatched since the start."""
    matched_tokens: int
    """Those of them that the chosen worker's cache was thought to hold."""

    @property
    def saturation(self) -> float:
        """Share of what serves that cannot take a request now; 1 when nothing serves."""
        return 1 - self.open / self.ready if self.ready else 1.0


def read(now: float, ledger: Ledger, fleet: Fleet) -> Gauges:
    """The numbers now."""
    pools, counters = fleet.pools.values(), ledger.counters
    tenants = ((each.name, each.queued, each.running) for each in ledger.tenants)
    return Gauges(
        _bands(now, ledger),
        sum(pool.ready for pool in pools),
        sum(pool.open for pool in pools),
        tuple(tenant for tenant in tenants if tenant[1] or tenant[2]),
        counters.promoted,
        counters.placed_tokens,
        counters.matched_tokens,
    )


def _bands(now: float, ledger: Ledger) -> tuple[BandGauges, ...]:
    depth, tokens = [0] * PRIORITY_LAST, [0] * PRIORITY_LAST
    oldest_s, estimate_s = [0.0] * PRIORITY_LAST, [0.0] * PRIORITY_LAST
    for queue in ledger.queues.values():
        ahead, waits = 0, oldest_by_band(queue, now)
        for index, band in enumerate(queue.bands):
            ahead += band.depth
            depth[index] += band.depth
            tokens[index] += band.prompt_tokens
            oldest_s[index] = max(oldest_s[index], waits.get(index + 1, 0.0))
            estimate_s[index] = max(estimate_s[index], queue.gap_s * ahead)
    return tuple(map(BandGauges, depth, tokens, oldest_s, estimate_s))
