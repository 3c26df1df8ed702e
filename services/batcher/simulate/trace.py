"""A recorded trace as requests in virtual time, at any multiple of its rate.

A Mooncake trace says when requests came in steps of 3 s. At rate k all times are divided by k, and the
requests of one step are spread over its 3/k s: one at a random place in each equal part of it, in the
order of the file, drawn with the seed. A prompt's whole blocks of 512 tokens get numbers that name all
tokens up to their end, as the prefix hashes of real requests do; its last, partial block gets none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from random import Random
from typing import NamedTuple

from tokenloom.bench.traces import BLOCK_TOKENS, Entry

TIMESTAMP_STEP_S = 3.0
"""The resolution of the recorded timestamps."""

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Recorded(NamedTuple):
    """One request, whatever the rate."""

    timestamp_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...]
    """One number for each whole block of BLOCK_TOKENS of the prompt."""


class Arrival(NamedTuple):
    """One request of a run."""

    at: float
    """Seconds from the beginning of the run."""
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...]


def chained(parent: int, block: int) -> int:
    """The number of a prefix: that of the prefix before it and its last block, well mixed (splitmix64)."""
    value = (parent * 0x9E3779B97F4A7C15 + block + 1) & _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def recorded(entries: Sequence[Entry]) -> list[Recorded]:
    """The entries of a trace, in order of time; an answer has one token at least."""
    made = []
    for entry in sorted(entries, key=lambda each: each.timestamp):
        number, prefix = 0, []
        for block in entry.hash_ids[: entry.input_length // BLOCK_TOKENS]:
            number = chained(number, block)
            prefix.append(number)
        output_tokens = max(entry.output_length, 1)
        made.append(Recorded(entry.timestamp / 1000, entry.input_length, output_tokens, tuple(prefix)))
    return made


def at_rate(trace: Sequence[Recorded], rate: float, seed: int) -> list[Arrival]:
    """The requests at `rate` times the recorded rate, the earliest first. Raises ValueError for no rate."""
    if rate <= 0:
        raise ValueError(f"a rate is positive, not {rate}")
    random = Random(seed)
    arrivals = []
    for step, members in groupby(trace, key=lambda each: each.timestamp_s):
        together = list(members)
        width_s = TIMESTAMP_STEP_S / rate / len(together)
        for place, each in enumerate(together):
            at = step / rate + (place + random.random()) * width_s
            arrivals.append(Arrival(at, each.prompt_tokens, each.output_tokens, each.prefix))
    return sorted(arrivals, key=lambda arrival: arrival.at)
