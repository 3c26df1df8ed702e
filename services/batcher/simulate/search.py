"""The highest rate at which a policy still serves its share in time, found by narrowing a bracket.

Rates lie on a grid of RATE_STEP between RATE_MIN and RATE_MAX. The share is taken to fall as the rate
grows; where it does not, the answer is one of the rates at which it crosses the line.
"""

from __future__ import annotations

RATE_STEP = 0.05
RATE_MIN = 0.25
RATE_MAX = 64.0
RATE_FIRST = 4.0
GROWTH = 1.5
"""From one rate to the next, until the bracket has two ends."""


def on_grid(rate: float) -> float:
    """The nearest rate of the grid."""
    return round(min(max(rate, RATE_MIN), RATE_MAX) / RATE_STEP) * RATE_STEP


class RateSearch:
    """The bracket of one policy."""

    def __init__(self, share_min: float) -> None:
        self._share_min = share_min
        self._good = 0.0
        """The highest rate that was good enough, below every rate that was not."""
        self._bad = RATE_MAX + RATE_STEP
        """The lowest rate that was not."""

    def note(self, rate: float, share: float) -> None:
        """What came of a rate."""
        if share >= self._share_min:
            if rate < self._bad:
                self._good = max(self._good, rate)
        else:
            self._bad = min(self._bad, rate)
            if self._good >= self._bad:
                self._good = 0.0

    def next_rates(self, count: int) -> list[float]:
        """Up to `count` rates to try at once; none when the answer is known."""
        if self._bad > RATE_MAX:
            first = on_grid(self._good * GROWTH) if self._good else RATE_FIRST
            rates = [on_grid(first * GROWTH**step) for step in range(count)]
            return _between(rates, self._good, self._bad)
        if not self._good:
            rates = [on_grid(self._bad / GROWTH ** (step + 1)) for step in range(count)]
            return _between(rates, 0.0, self._bad)
        width = (self._bad - self._good) / (count + 1)
        rates = [on_grid(self._good + width * (part + 1)) for part in range(count)]
        return _between(rates, self._good, self._bad)

    @property
    def best(self) -> float:
        """The highest rate found so far; 0: none was good enough, down to RATE_MIN."""
        return round(self._good, 4)


def _between(rates: list[float], low: float, high: float) -> list[float]:
    """Those strictly inside, each once."""
    inside = {round(rate, 4) for rate in rates if low + RATE_STEP / 2 < rate < high - RATE_STEP / 2}
    return sorted(inside)
