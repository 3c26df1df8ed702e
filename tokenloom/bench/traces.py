"""Recorded workloads: JSON lines as the Mooncake project publishes them.

One line is one request: `timestamp` (ms from the beginning), `input_length` and `output_length`
(tokens), and `hash_ids`, one for each BLOCK_TOKENS tokens of the prompt: equal ids, equal tokens.
Bound: REQUESTS_MAX lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from tokenloom.bench.prompts import Item, Part

BLOCK_TOKENS = 512
REQUESTS_MAX = 1_000_000

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class TraceError(ValueError):
    """A line that is no request; the message names it."""


class Entry(msgspec.Struct, frozen=True):
    """One line. Fields that are not named here are passed over."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Positive
    output_length: NotNegative
    hash_ids: list[NotNegative] = []


@dataclass(frozen=True, slots=True)
class Fit:
    """How a trace is fitted to the machine at hand."""

    rate_scale: float = 1.0
    """2: twice the recorded rate."""
    length_scale: float = 1.0
    """0.1: prompts, answers and shared blocks of a tenth of the recorded length."""
    input_max: int = 1_000_000
    """Longer prompts are cut at their end."""
    output_max: int = 1_000_000


def read(lines: Iterable[bytes], count: int) -> list[Entry]:
    """The first `count` requests. Raises TraceError with the number of the line that is wrong."""
    decoder = msgspec.json.Decoder(Entry)
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if len(entries) >= min(count, REQUESTS_MAX):
            break
        if not line.strip():
            continue
        try:
            entries.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise TraceError(f"line {number}: {error}") from None
    if not entries:
        raise TraceError("no request in it")
    return entries


def items(entries: Iterable[Entry], fit: Fit) -> list[Item]:
    """The trace as a workload, earliest first."""
    made = [_item(number, entry, fit) for number, entry in enumerate(entries)]
    first = min((item.at_s for item in made), default=0.0)
    shifted = [Item(item.parts, item.output_tokens, item.at_s - first) for item in made]
    return sorted(shifted, key=lambda item: item.at_s)


def cut(entries: Iterable[Entry], fit: Fit) -> int:
    """How many requests `fit` makes shorter than their scaled length."""
    return sum(
        _scaled(entry.input_length, fit) > fit.input_max or _scaled(entry.output_length, fit) > fit.output_max
        for entry in entries
    )


def _item(number: int, entry: Entry, fit: Fit) -> Item:
    left = min(_scaled(entry.input_length, fit), fit.input_max)
    block = _scaled(BLOCK_TOKENS, fit)
    parts: list[Part] = []
    for hash_id in entry.hash_ids:
        if left <= 0:
            break
        parts.append(Part(f"block-{hash_id}", min(block, left)))
        left -= parts[-1].tokens
    if left > 0:
        parts.append(Part(f"request-{number}", left))
    output = min(_scaled(entry.output_length, fit), fit.output_max)
    return Item(tuple(parts), output, entry.timestamp / 1000 / fit.rate_scale)


def _scaled(tokens: int, fit: Fit) -> int:
    return max(1, round(tokens * fit.length_scale))
