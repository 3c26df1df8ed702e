"""The law of a step's time that a simulator uses, and its six numbers from measured steps.

    step_s = fixed_s + max(weights_s, tokens · token_s) + kv_tokens · kv_s + pairs · pair_s
             + sequences · sequence_s

No number is negative, and what is made small is the relative error: a step of 5 ms counts as much as one
of 200. Errors above `NEAR` count as they are, not squared, so that a step that something else held up does
not bend the law for all others (Huber's loss, by least squares that are weighed again and again). Which
steps are bound by their tokens is tried for every cut of the points; for each cut the least squares are
exact, as every set of terms is tried. Pure: no engine, no torch, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TERMS = 6
NEAR = 0.03
"""Relative errors up to here are noise, and count squared."""
ROUNDS = 12
"""Of weighing."""
POINTS_MAX = 1000
"""The cuts and the terms of so many points are tried within seconds."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step computes; means of several steps need not be whole."""

    tokens: float
    """All of the step's, decodes and prompts."""
    kv_tokens: float
    """What the decodes attend to, their own tokens included, summed."""
    pairs: float
    """Over the chunks of prompts: tokens · (tokens before them + half of them)."""
    sequences: float

    @staticmethod
    def mean(works: Sequence[Work]) -> Work:
        """Raises ValueError for none."""
        if not works:
            raise ValueError("no step was measured")
        return Work(*(sum(values) / len(works) for values in zip(*map(astuple, works), strict=True)))


@dataclass(frozen=True, slots=True)
class Law:
    """Seconds of each kind of work, none negative."""

    fixed_s: float
    weights_s: float
    token_s: float
    kv_s: float
    pair_s: float
    sequence_s: float

    def step_s(self, work: Work) -> float:
        """How long such a step takes."""
        return (
            self.fixed_s
            + max(self.weights_s, work.tokens * self.token_s)
            + work.kv_tokens * self.kv_s
            + work.pairs * self.pair_s
            + work.sequences * self.sequence_s
        )


@dataclass(frozen=True, slots=True)
class Errors:
    """Of a law against measured steps, relative."""

    median: float
    largest: float


def fit(works: Sequence[Work], took_s: Sequence[float]) -> Law:
    """The law whose relative errors, squared and summed, are least. Raises ValueError for no or bad points.

    With too few kinds of points some terms cannot be told apart; their sum is still right at the points.
    """
    if not 0 < len(works) <= POINTS_MAX:
        raise ValueError(f"{len(works)} points; from 1 to {POINTS_MAX} can be fitted")
    if not all(0 < value < float("inf") for value in took_s):
        raise ValueError("a step that took no time")
    cuts = sorted({0.0, *(work.tokens for work in works)})
    return min((_law(works, took_s, cut) for cut in cuts), key=lambda law: loss(law, works, took_s))


def loss(law: Law, works: Sequence[Work], took_s: Sequence[float]) -> float:
    """Huber's, summed over the points."""
    found = map(abs, relative(law, works, took_s))
    return sum(error**2 if error <= NEAR else NEAR * (2 * error - NEAR) for error in found)


def relative(law: Law, works: Sequence[Work], took_s: Sequence[float]) -> list[float]:
    """(law - measured) / measured, point by point."""
    return [(law.step_s(work) - took) / took for work, took in zip(works, took_s, strict=True)]


def errors(law: Law, works: Sequence[Work], took_s: Sequence[float]) -> Errors:
    """Raises ValueError without points."""
    found = [abs(error) for error in relative(law, works, took_s)]
    return Errors(median(found), max(found))


def _law(works: Sequence[Work], took_s: Sequence[float], cut: float) -> Law:
    """The best one, were just the steps of at most `cut` tokens bound by their weights."""
    rows = [
        (1.0, float(work.tokens <= cut), work.tokens * (work.tokens > cut), work.kv_tokens, work.pairs,
         work.sequences)
        for work in works
    ]  # fmt: skip
    columns = np.array(rows, dtype=np.float64) / np.array(took_s, dtype=np.float64)[:, None]
    weights = np.ones(len(rows))
    best = Law(*map(float, not_negative(columns, weights)))
    for _ in range(ROUNDS):
        far = np.abs(np.array(relative(best, works, took_s))) / NEAR
        weights = 1 / np.sqrt(np.maximum(far, 1))
        best = Law(*map(float, not_negative(columns * weights[:, None], weights)))
    return best


def not_negative(columns: Floats, wanted: Floats) -> Floats:
    """[terms] not below 0, with which the columns' sum [points] is nearest to `wanted`, by least squares.

    The best of all sets of terms whose plain least squares have no negative one: that is the optimum.
    """
    terms = columns.shape[1]
    # Terms differ by ten orders of magnitude; of equal length they are solved without loss.
    sizes = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(sizes > 0, sizes, 1)
    best, least = np.zeros(terms), float(np.sum(wanted**2))
    for count in range(1, terms + 1):
        for chosen in combinations(np.flatnonzero(sizes > 0), count):
            found = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((scaled[:, chosen] @ found - wanted) ** 2))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(terms), error
                best[list(chosen)] = found / sizes[list(chosen)]
    return best
