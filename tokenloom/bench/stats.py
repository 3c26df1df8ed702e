"""From the times of single requests to the figures of a level. Definitions follow `vllm bench serve`.

- TTFT: from the request (in an open loop: from when it was due) to its first piece of text.
- ITL: between two pieces of text of one stream. A piece may hold several tokens: see `chunks_per_token`.
- TPOT: of one request, the time after its first piece divided by its tokens after the first.
- E2EL: from the request to the end of its stream.
- Throughputs: completed requests and their tokens, divided by the time from the first request to the
  last end.
- Goodput: requests per second whose TTFT and TPOT are inside the objectives. A failed request is outside.

Percentiles interpolate linearly between the closest ranks, as numpy does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

CDF_POINTS = 101
"""A level carries this many evenly spaced percentiles of TTFT and ITL, for plots."""


@dataclass(slots=True)
class Record:
    """One request as its caller saw it. Seconds of one monotonic clock."""

    due_s: float = 0.0
    """When it was sent; in an open loop when it should have been."""
    pieces_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    ended_s: float = 0.0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    wanted_tokens: int = 0
    error: str = ""
    """A short reason in capitals; empty when the whole answer came."""

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """0 for an answer of one token."""
        after = self.output_tokens - 1
        return (self.pieces_s[-1] - self.pieces_s[0]) / after if after > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What counts as good, in milliseconds; None: anything."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """Held against a request's mean time per token (TPOT)."""

    def __bool__(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None

    def met(self, record: Record) -> bool:
        """Whether a completed request was good."""
        ttft_ms, itl_ms = record.ttft_s * 1e3, record.tpot_s * 1e3
        return (self.ttft_ms is None or ttft_ms <= self.ttft_ms) and (
            self.itl_ms is None or itl_ms <= self.itl_ms
        )


class Spread(msgspec.Struct, frozen=True):
    """How values are spread."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None without values."""
        ordered = sorted(values)
        if not ordered:
            return None
        at = [percentile(ordered, share) for share in (0.5, 0.9, 0.99)]
        return cls(sum(ordered) / len(ordered), at[0], at[1], at[2], ordered[-1])


class Term(msgspec.Struct, frozen=True):
    """A part of a step's work, and the least time that it takes."""

    bytes: float
    operations: float
    ms: float


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The least time of one step on a machine of known speeds."""

    batch: float
    """Sequences."""
    context: float
    """Tokens that each of them attends to."""
    step_ms: float
    """The sum of the terms."""
    terms: dict[str, Term] = {}


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """Steps that only decode, of a full batch near one context."""

    batch: int
    context: int
    """As asked for."""
    context_mean: float
    steps: int
    """0: there was no such step."""
    step_ms: Spread | None
    tokens_per_s: float
    """`batch` divided by the median step."""
    parts_ms: dict[str, float] = {}
    floor: Floor | None = None


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """What the steps of an engine took; only an engine in the same process can tell."""

    steps: int
    step_ms: Spread | None = None
    decode_step_ms: Spread | None = None
    """Of steps without prompt tokens."""
    decode_sequences_mean: float = 0.0
    decode_context_mean: float = 0.0
    """Tokens that a sequence attended to in them."""
    decode_floor: Floor | None = None
    """At those means, where the machine's speeds are known."""
    decode_only: Decode | None = None
    """At one context, where that was asked for."""
    step_tokens_mean: float = 0.0
    prefill_tokens_per_s: float = 0.0
    """Prompt tokens computed, divided by the time of the steps that computed any."""
    prefill_floor_tokens_per_s: float | None = None
    """Where all prompts are computed together, and nothing else."""
    preemptions: int = 0
    parts_ms: dict[str, float] = {}
    """Mean time of a step's parts, where the engine keeps an account."""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what came of it. Milliseconds and tokens; rates are per second."""

    max_concurrency: int
    """Closed loop: requests always in flight. Open loop: the most in flight."""
    request_rate: float | None = None
    """Open loop: arrivals per second, as asked or as the trace has them."""
    num_requests: int
    completed: int
    failed: int
    errors: dict[str, int] = {}
    held_back: int = 0
    """Open loop: requests that had to wait for one in flight to end."""
    other_length: int = 0
    """Completed answers that are not as long as asked."""
    duration_s: float
    floor_s: float | None = None
    """The least time of the whole level, for an engine alone on a machine of known speeds."""
    total_input_tokens: int
    total_cached_tokens: int = 0
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float | None = None
    good_share: float | None = None
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    e2el_ms: Spread | None
    chunks_per_token: float
    client_cpu_s: float = 0.0
    client_cpu_us_per_token: float = 0.0
    ttft_ms_cdf: list[float] = []
    itl_ms_cdf: list[float] = []
    steps: Steps | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """How a level was driven."""

    max_concurrency: int
    request_rate: float | None = None
    held_back: int = 0
    cpu_s: float = 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values; `share` from 0 to 1. Raises ValueError without values."""
    if not ordered:
        raise ValueError("no values, no percentile")
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def cdf(values: Iterable[float]) -> list[float]:
    """CDF_POINTS percentiles from the least to the greatest; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return []
    return [round(percentile(ordered, point / (CDF_POINTS - 1)), 4) for point in range(CDF_POINTS)]


def level(records: Sequence[Record], run: Run, objectives: Objectives, steps: Steps | None = None) -> Level:
    """The figures of one level."""
    done = [record for record in records if not record.error]
    spoken = [record for record in done if record.pieces_s]
    began_s = min((record.due_s for record in records), default=0.0)
    duration_s = max((record.ended_s for record in records), default=0.0) - began_s
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    given = sum(record.prompt_tokens for record in done)
    drawn = sum(record.output_tokens for record in done)
    good = sum(objectives.met(record) for record in spoken)
    ttft = [record.ttft_s * 1e3 for record in spoken]
    itl = [(late - early) * 1e3 for record in spoken for early, late in pairwise(record.pieces_s)]
    return Level(
        max_concurrency=run.max_concurrency,
        request_rate=run.request_rate,
        num_requests=len(records),
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        held_back=run.held_back,
        other_length=sum(record.output_tokens != record.wanted_tokens for record in done),
        duration_s=duration_s,
        total_input_tokens=given,
        total_cached_tokens=sum(record.cached_prompt_tokens for record in done),
        total_output_tokens=drawn,
        request_throughput=len(done) * per_s,
        output_throughput=drawn * per_s,
        total_token_throughput=(given + drawn) * per_s,
        request_goodput=good * per_s if objectives else None,
        good_share=good / len(records) if objectives and records else None,
        ttft_ms=Spread.of(ttft),
        itl_ms=Spread.of(itl),
        tpot_ms=Spread.of(record.tpot_s * 1e3 for record in spoken if record.output_tokens > 1),
        e2el_ms=Spread.of((record.ended_s - record.due_s) * 1e3 for record in done),
        chunks_per_token=sum(len(record.pieces_s) for record in done) / drawn if drawn else 0.0,
        client_cpu_s=run.cpu_s,
        client_cpu_us_per_token=run.cpu_s * 1e6 / drawn if drawn else 0.0,
        ttft_ms_cdf=cdf(ttft),
        itl_ms_cdf=cdf(itl),
        steps=steps,
    )
