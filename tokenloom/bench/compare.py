"""Several systems measured in turn: medians over the rounds, and ratios of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from tokenloom.bench.stats import Level, Spread

SCHEMA = "tokenloom.bench-peers/1"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One system under one load in one round."""

    system: str
    round: int
    level: Level
    idle_cpu_cores: dict[str, float] = {}
    """CPU that each other system took meanwhile, in cores: it should be next to nothing."""
    load_average_1m: float = 0.0
    """Of the machine, when the cell began."""


class Median(msgspec.Struct, frozen=True, kw_only=True):
    """One system under one load: the median of its rounds."""

    system: str
    concurrency: int
    rounds: int
    output_throughput: float
    output_throughput_least: float
    output_throughput_most: float
    ttft_ms_p50: float | None
    ttft_ms_p99: float | None
    itl_ms_p50: float | None
    itl_ms_p99: float | None
    chunks_per_token: float
    failed: int
    """Of all rounds together."""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """The first system divided by another one, under one load."""

    peer: str
    concurrency: int
    output_throughput: float
    """Above 1: the first gives more."""
    ttft_p50: float | None
    """Below 1: the first answers sooner."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The document that a comparison leaves behind."""

    schema: str = SCHEMA
    started_unix_s: float
    machine: dict[str, str | int | float | list[str]]
    workload: dict[str, str | int | float]
    systems: dict[str, dict[str, str | int | float]]
    """What each was, by its name: version, dtype, command."""
    cells: list[Cell]
    medians: list[Median]
    ratios: list[Ratio]


def medians(cells: Sequence[Cell]) -> list[Median]:
    """One for each system and load, in the order of their first cells."""
    groups: dict[tuple[int, str], list[Level]] = {}
    for cell in cells:
        groups.setdefault((cell.level.max_concurrency, cell.system), []).append(cell.level)
    return [_median(system, concurrency, levels) for (concurrency, system), levels in groups.items()]


def ratios(found: Sequence[Median], first: str) -> list[Ratio]:
    """Of `first` to every other system, wherever both were measured and the other gave anything."""
    ours = {median.concurrency: median for median in found if median.system == first}
    return [
        Ratio(
            peer=peer.system,
            concurrency=peer.concurrency,
            output_throughput=ours[peer.concurrency].output_throughput / peer.output_throughput,
            ttft_p50=_divided(ours[peer.concurrency].ttft_ms_p50, peer.ttft_ms_p50),
        )
        for peer in found
        if peer.system != first and peer.concurrency in ours and peer.output_throughput > 0
    ]


def turns(systems: Sequence[str], loads: Sequence[int], rounds: int) -> Iterator[tuple[int, int, str]]:
    """Round, load and system of every cell: systems side by side, and each round begins with another."""
    for number in range(rounds):
        shift = number % len(systems)
        for load in loads:
            for system in (*systems[shift:], *systems[:shift]):
                yield number, load, system


def median_levels(cells: Sequence[Cell], system: str) -> list[Level]:
    """One level for each load, the one whose throughput is the median: for plots."""
    groups: dict[int, list[Level]] = {}
    for cell in cells:
        if cell.system == system:
            groups.setdefault(cell.level.max_concurrency, []).append(cell.level)
    return [_middle(levels) for _, levels in sorted(groups.items())]


def _middle(levels: Sequence[Level]) -> Level:
    ordered = sorted(levels, key=lambda level: level.output_throughput)
    return ordered[(len(ordered) - 1) // 2]


def _median(system: str, concurrency: int, levels: Sequence[Level]) -> Median:
    rates = [level.output_throughput for level in levels]
    return Median(
        system=system,
        concurrency=concurrency,
        rounds=len(levels),
        output_throughput=statistics.median(rates),
        output_throughput_least=min(rates),
        output_throughput_most=max(rates),
        ttft_ms_p50=_of([level.ttft_ms for level in levels], "p50"),
        ttft_ms_p99=_of([level.ttft_ms for level in levels], "p99"),
        itl_ms_p50=_of([level.itl_ms for level in levels], "p50"),
        itl_ms_p99=_of([level.itl_ms for level in levels], "p99"),
        chunks_per_token=statistics.median(level.chunks_per_token for level in levels),
        failed=sum(level.failed for level in levels),
    )


def _of(spreads: Sequence[Spread | None], point: str) -> float | None:
    values = [float(getattr(spread, point)) for spread in spreads if spread is not None]
    return statistics.median(values) if values else None


def _divided(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
