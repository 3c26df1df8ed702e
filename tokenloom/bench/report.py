"""The document that a benchmark leaves behind: what `--json` writes, what plots and comparisons read.

One JSON object with the fields of `Report`; its levels have the fields of `stats.Level`. The schema's
name changes when a field changes its meaning or leaves; new fields may come without that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from tokenloom.bench.stats import Level, Record, Spread

SCHEMA = "tokenloom.bench/1"


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """TTFT without and with a cached prefix, in pairs of requests, one after the other."""

    prefix_tokens: int
    prompt_tokens: int
    """The whole prompt, prefix included."""
    pairs: int
    cold_ttft_ms: Spread
    warm_ttft_ms: Spread
    cached_tokens_mean: float
    """Prompt tokens that the warm requests found cached, as the engine says."""
    ratio: float
    """Median warm TTFT divided by median cold TTFT."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark."""

    schema: str = SCHEMA
    kind: Literal["mesh", "engine"]
    target: str
    """The address, or the folder of the model."""
    model: str
    protocol: str = ""
    """`openai-chat`, `openai-completions`, `grpc`, or `in process` and how prompts were made."""
    seed: int
    started_unix_s: float
    workload: dict[str, str | int | float] = {}
    machine: dict[str, str | int | float | list[str]] = {}
    engine: dict[str, str | int | float] = {}
    """What an engine in process says of itself: device, dtype, blocks, threads."""
    levels: list[Level] = []
    prefix: Prefix | None = None


def encode(report: msgspec.Struct) -> bytes:
    """Indented JSON with a line's end."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def decode(data: bytes) -> Report:
    """Raises msgspec.ValidationError or DecodeError for anything else, another schema included."""
    report = msgspec.json.decode(data, type=Report)
    if report.schema != SCHEMA:
        raise msgspec.ValidationError(f"schema is {report.schema!r}, not {SCHEMA!r}")
    return report


def compare(prefix_tokens: int, cold: Sequence[Record], warm: Sequence[Record]) -> Prefix:
    """What a cached prefix saved. Raises ValueError when a request failed, or there is none."""
    for record in (*cold, *warm):
        if record.error or not record.pieces_s:
            raise ValueError(f"a request failed: {record.error or 'no text came'}")
    cold_ms, warm_ms = (Spread.of(record.ttft_s * 1e3 for record in side) for side in (cold, warm))
    if cold_ms is None or warm_ms is None:
        raise ValueError("no requests, no comparison")
    return Prefix(
        prefix_tokens=prefix_tokens,
        prompt_tokens=round(statistics.fmean(record.prompt_tokens for record in cold)),
        pairs=len(cold),
        cold_ttft_ms=cold_ms,
        warm_ttft_ms=warm_ms,
        cached_tokens_mean=statistics.fmean(record.cached_prompt_tokens for record in warm),
        ratio=warm_ms.p50 / cold_ms.p50,
    )
