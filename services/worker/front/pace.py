"""The gap between steps, counted for each token that it delayed: the inter-token latency.

A histogram that takes a whole step in one call, because observing token by token would cost more than
the rest of the front's work on it. Read by `metrics.py`; knows nothing of its names.
"""

from __future__ import annotations

from bisect import bisect_left

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets; one more takes the rest."""
IDLE_NS = 30_000_000_000
"""A longer gap is idleness, not latency."""


class Pace:
    """Counts of step gaps, weighted with the outputs of the step that ended them."""

    __slots__ = ("_last_ns", "counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0
        self._last_ns = 0

    def step(self, continued: int, now_ns: int) -> None:
        """A step ended at `now_ns` and gave `continued` sequences a token that was not their first."""
        last_ns, self._last_ns = self._last_ns, now_ns
        if continued and 0 <= (gap_ns := now_ns - last_ns) < IDLE_NS:
            gap_s = gap_ns * 1e-9
            self.counts[bisect_left(BOUNDS_S, gap_s)] += continued
            self.sum_s += gap_s * continued
