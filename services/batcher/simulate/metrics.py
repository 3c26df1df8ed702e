"""What came of a run: who was served in time, and how evenly the work was spread.

A request is good when its first token comes within `slo.ttft_s` of its arrival and its mean time
between tokens is at most `slo.itl_s`; refused and unfinished ones are not. Requests whose prompt alone
takes longer than `slo.ttft_s` on an idle worker with a cold cache are out of reach for every policy:
they are served, counted apart, and left out of shares and percentiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from services.batcher.simulate.law import Profile
from services.batcher.simulate.record import Record, Sample
from services.batcher.simulate.trace import Arrival

SERIES_MAX = 600
"""Points of a time series that are kept."""


class Slo(msgspec.Struct, frozen=True):
    """What a good request keeps."""

    ttft_s: float
    itl_s: float


class Percentiles(msgspec.Struct, frozen=True):
    """Of one quantity, in milliseconds; 0 when there is none of it."""

    p50: float
    p90: float
    p99: float


class OutOfReach(msgspec.Struct, frozen=True):
    """Requests that no policy can serve in time, and what became of them."""

    requests: int
    ended: int
    ttft_ms: Percentiles


class Series(msgspec.Struct, frozen=True):
    """The queues over time, in seconds from the beginning."""

    at_s: list[float]
    held: list[int]
    queued: list[int]
    running: list[int]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one policy at one rate."""

    policy: str
    rate: float
    requests: int
    out_of_reach: OutOfReach
    good: int
    good_share: float
    """Of the requests in reach."""
    goodput: float
    """Good requests a second, over the time of the arrivals."""
    ttft_ok_share: float
    itl_ok_share: float
    """Of those in reach, whatever the other one was."""
    ttft_ms: Percentiles
    itl_ms: Percentiles
    hit_rate: float
    """Of the prompt tokens of all sequences begun."""
    jain_load: float
    """Jain's index of the workers' busy time: 1 is even."""
    busy_share: float
    """Of the workers' time until the last arrival; above 1 when much was left to do then."""
    refusals: dict[str, int]
    unfinished: int
    preemptions: int
    wall_s: float
    """That the simulation took."""
    series: Series


def summarise(
    policy: str,
    rate: float,
    arrivals: Sequence[Arrival],
    record: Record,
    profile: Profile,
    slo: Slo,
    wall_s: float,
) -> Result:
    """The figures of one run."""
    reach = in_reach(arrivals, profile, slo)
    apart = sorted(set(range(len(arrivals))).difference(reach))
    itl = [_itl_s(n, arrivals, record) for n in reach if record.ended_at[n] >= 0]
    ttft_ok = {n for n in reach if 0 <= record.first_token_at[n] <= arrivals[n].at + slo.ttft_s}
    itl_ok = {n for n in reach if record.ended_at[n] >= 0 and _itl_s(n, arrivals, record) <= slo.itl_s}
    good = len(ttft_ok & itl_ok)
    span_s = max(arrivals[-1].at, 1e-9)
    totals = list(record.workers.values())
    prompts = sum(each.prompt_tokens for each in totals)
    busy = [each.busy_s for each in totals]
    unfinished = sum(end < 0 for end in record.ended_at) - len(record.refusals)
    return Result(
        policy=policy,
        rate=rate,
        requests=len(arrivals),
        out_of_reach=OutOfReach(
            len(apart),
            sum(record.ended_at[n] >= 0 for n in apart),
            percentiles(_ttft_s(apart, arrivals, record)),
        ),
        good=good,
        good_share=good / max(len(reach), 1),
        goodput=good / span_s,
        ttft_ok_share=len(ttft_ok) / max(len(reach), 1),
        itl_ok_share=len(itl_ok) / max(len(reach), 1),
        ttft_ms=percentiles(_ttft_s(reach, arrivals, record)),
        itl_ms=percentiles(itl),
        hit_rate=sum(each.hit_tokens for each in totals) / max(prompts, 1),
        jain_load=jain(busy),
        busy_share=sum(busy) / (len(busy) * span_s),
        refusals=dict(sorted(Counter(record.refusals.values()).items())),
        unfinished=unfinished,
        preemptions=record.preemptions,
        wall_s=wall_s,
        series=_series(record.samples),
    )


def in_reach(arrivals: Sequence[Arrival], profile: Profile, slo: Slo) -> list[int]:
    """Numbers of the requests whose cold prompt alone takes no longer than the SLO allows."""
    return [n for n, each in enumerate(arrivals) if profile.cold_prefill_s(each.prompt_tokens) <= slo.ttft_s]


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """The nearest ranks, in milliseconds."""
    ranked = sorted(seconds)

    def at(share: float) -> float:
        return round(1000 * ranked[min(int(share * len(ranked)), len(ranked) - 1)], 3) if ranked else 0.0

    return Percentiles(at(0.5), at(0.9), at(0.99))


def jain(loads: Sequence[float]) -> float:
    """Jain's index of fairness: (sum x)^2 / (n * sum x^2); 1 when there is no load at all."""
    squares = sum(load * load for load in loads)
    return sum(loads) ** 2 / (len(loads) * squares) if squares else 1.0


def _ttft_s(numbers: Sequence[int], arrivals: Sequence[Arrival], record: Record) -> list[float]:
    """Of those that got a first token."""
    return [record.first_token_at[n] - arrivals[n].at for n in numbers if record.first_token_at[n] >= 0]


def _itl_s(number: int, arrivals: Sequence[Arrival], record: Record) -> float:
    """The mean time between tokens; 0 for an answer of one token."""
    gaps = arrivals[number].output_tokens - 1
    return (record.ended_at[number] - record.first_token_at[number]) / gaps if gaps else 0.0


def _series(samples: Sequence[Sample]) -> Series:
    every = -(-len(samples) // SERIES_MAX) or 1
    kept = samples[::every]
    return Series(
        [round(each.at, 3) for each in kept],
        [each.held for each in kept],
        [each.queued for each in kept],
        [each.running for each in kept],
    )
