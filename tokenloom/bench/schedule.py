"""When the requests of an open loop are sent."""

from __future__ import annotations

import random
from itertools import accumulate


def poisson(rate: float, count: int, rng: random.Random) -> list[float]:
    """Arrival times in seconds, the first at 0: gaps are exponential with mean `1 / rate`.

    Raises ValueError unless `rate` (requests per second) is positive and finite.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"the rate must be a positive number of requests per second, not {rate}")
    gaps = (rng.expovariate(rate) for _ in range(max(0, count - 1)))
    return list(accumulate(gaps, initial=0.0))[:count]
