"""Random numbers that depend on nothing but a sequence's seed and the position that they are for.

    u(seed, position) = (bits + 1/2) / 2^52,  bits = the upper 52 of mix(mix(seed) + (position + 1) · γ)

`mix` is SplitMix64's finalizer and γ its increment, all modulo 2^64, so each seed has its own SplitMix64
stream and a position is an index into it. No state is kept: neither the rest of the batch, nor the device,
nor a resume on another worker changes what is drawn. Positions count from the prompt's first token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Unsigned = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: Unsigned, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in (0, 1) for each pair."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds) + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mix(value: Unsigned) -> Unsigned:
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    mixed: Unsigned = value ^ (value >> np.uint64(31))
    return mixed
