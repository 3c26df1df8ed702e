"""What one engine did so far, in plain numbers: tokens, and the gaps between steps.

Fed once a step and once a sequence, never once a token, because observing token by token would cost
more than the rest of the front's work on it. A gap is counted for each sequence that it delayed, which
is the inter-token latency. `metrics.py` reads this; nothing here knows its names.
"""

from __future__ import annotations

from bisect import bisect_left

from services.worker.front.sequence import Sequence

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the gap's buckets; one more takes the rest."""
IDLE_NS = 30_000_000_000
"""A longer gap is idleness, not latency."""


class Tally:
    """Counts of one engine, over all lives of its process."""

    __slots__ = (
        "_last_ns",
        "cached_tokens",
        "gap_counts",
        "gap_sum_s",
        "generated_tokens",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self.prompt_tokens = 0
        """Of sequences that gave a first token."""
        self.cached_tokens = 0
        """Those of them that a prefix cache held."""
        self.generated_tokens = 0
        self.gap_counts = [0] * (len(BOUNDS_S) + 1)
        self.gap_sum_s = 0.0
        self._last_ns = 0

    def began(self, sequence: Sequence) -> None:
        """A sequence gave its first token."""
        self.prompt_tokens += sequence.prompt_tokens
        self.cached_tokens += sequence.cached_prompt_tokens

    def step(self, tokens: int, continued: int, now_ns: int) -> None:
        """A step gave `tokens`, at `now_ns`; `continued` sequences got one that was not their first."""
        last_ns, self._last_ns = self._last_ns, now_ns
        self.generated_tokens += tokens
        if continued and 0 <= (gap_ns := now_ns - last_ns) < IDLE_NS:
            gap_s = gap_ns * 1e-9
            self.gap_counts[bisect_left(BOUNDS_S, gap_s)] += continued
            self.gap_sum_s += gap_s * continued
