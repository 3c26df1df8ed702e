"""Workloads of fixed lengths: every request the same size, no two alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenloom.bench.prompts import Item, Part

REQUESTS_MAX = 1_000_000
CONCURRENCY_MAX = 10_000
TOKENS_MAX = 1_000_000
SEED_STEP = 1_000_003
"""Between the seeds of two levels of one run."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of each prompt, its template included, and of each answer."""

    prompt: int
    output: int


def fixed(tag: str, count: int, lengths: Lengths) -> list[Item]:
    """`count` requests that share no prefix with each other or with those of another `tag`."""
    return [Item((Part(f"{tag}-{number}", lengths.prompt),), lengths.output) for number in range(count)]


def pairs(tag: str, count: int, prefix: int, lengths: Lengths) -> list[tuple[Item, Item]]:
    """For each of `count` prefixes two requests: the first finds it nowhere, the second cached.

    Both are `prefix + lengths.prompt` tokens long and differ after the prefix.
    """

    def one(number: int, which: str) -> Item:
        shared = Part(f"{tag}-prefix-{number}", prefix)
        return Item((shared, Part(f"{tag}-{which}-{number}", lengths.prompt)), lengths.output)

    return [(one(number, "cold"), one(number, "warm")) for number in range(count)]


def at(items: Sequence[Item], times_s: Sequence[float]) -> list[Item]:
    """The same requests, due at these times."""
    return [replace(item, at_s=time_s) for item, time_s in zip(items, times_s, strict=True)]
