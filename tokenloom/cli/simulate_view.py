"""A comparison of policies as tables: for the terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from services.batcher.simulate.metrics import Result
from services.batcher.simulate.sweep import BoundAt, Outcome

BASE = "least_request"
"""The policy that the others are compared with."""
BOUND = "(bound)"
COLUMNS = (
    "policy",
    "good",
    "good/s",
    "TTFT p50 / p90 / p99 ms",
    "ITL p50 / p90 / p99 ms",
    "hits",
    "Jain",
    "refused",
    "out of reach: TTFT p50 / p99 s",
    "ran s",
)


class Grid(NamedTuple):
    """One table, in words. The first column is a name, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def show(outcome: Outcome, console: Console) -> None:
    """On a terminal."""
    console.print(_head(outcome))
    for grid in _grids(outcome):
        table = Table(title=grid.title, title_justify="left")
        for place, name in enumerate(grid.columns):
            table.add_column(name, justify="right" if place else "left")
        for row in grid.rows:
            table.add_row(*row, style="dim" if row[0] == BOUND else None)
        console.print(table)


def markdown(outcome: Outcome) -> str:
    """For a page."""
    parts = [_head(outcome)]
    for grid in _grids(outcome):
        rule = "|---|" + "---:|" * (len(grid.columns) - 1)
        lines = [f"| {' | '.join(cells)} |" for cells in (grid.columns, *grid.rows)]
        parts.append("\n".join((f"**{grid.title}**", "", lines[0], rule, *lines[1:])))
    return "\n\n".join(parts) + "\n"


def _head(outcome: Outcome) -> str:
    any_result = next(result for each in outcome.policies.values() for result in each.rates.values())
    return (
        f"{outcome.trace}: {any_result.requests:,} requests, "
        f"{any_result.out_of_reach.requests:,} of them out of reach; "
        f"{outcome.workers} workers ({outcome.profile.name}), seed {outcome.seed}; "
        f"good: TTFT ≤ {outcome.slo.ttft_s:g} s and mean ITL ≤ {outcome.slo.itl_s * 1000:g} ms"
    )


def _grids(outcome: Outcome) -> list[Grid]:
    """R90 if it was searched for, the shares over the rate, and all of each rate that every policy ran at."""
    common = set.intersection(*(set(each.rates) for each in outcome.policies.values()))
    rates = [rate for rate in outcome.bound.rates if rate in common]
    grids = [_r90(outcome)] if outcome.bound.r90 is not None else []
    if len(rates) > 1:
        grids.append(_shares(outcome, rates))
    for rate in rates:
        results = {name: each.rates[rate] for name, each in outcome.policies.items()}
        grids.append(_at_rate(rate, results, outcome.bound.rates[rate]))
    return grids


def _r90(outcome: Outcome) -> Grid:
    found = {name: each.r90 or 0.0 for name, each in outcome.policies.items()}
    base, bound = found.get(BASE, 0.0), outcome.bound.r90 or 0.0
    rows: list[tuple[str, ...]] = [
        (name, f"{r90:.2f}", f"{r90 / base:.2f}x" if base else "", f"{r90 / bound:.0%}" if bound else "")
        for name, r90 in sorted(found.items(), key=lambda item: -item[1])
    ]
    rows.append((BOUND, f"{bound:.2f}", f"{bound / base:.2f}x" if base else "", ""))
    title = "R90: the highest multiple of the recorded rate with 90 % good"
    return Grid(title, ("policy", "R90", f"of {BASE}", "of the bound"), rows)


def _shares(outcome: Outcome, rates: list[str]) -> Grid:
    rows: list[tuple[str, ...]] = [
        (name, *(f"{each.rates[rate].good_share:.1%}" for rate in rates))
        for name, each in outcome.policies.items()
    ]
    rows.append((BOUND, *(f"≤ {outcome.bound.rates[rate].good_share:.1%}" for rate in rates)))
    return Grid("Good, over the rate", ("policy", *rates), rows)


def _at_rate(rate: str, results: Mapping[str, Result], bound: BoundAt) -> Grid:
    rows = [_row(name, result) for name, result in results.items()]
    empty = ("",) * (len(COLUMNS) - 3)
    rows.append((BOUND, f"≤ {bound.good_share:.1%}", f"≤ {bound.goodput:.2f}", *empty))
    return Grid(f"Rate {rate}", COLUMNS, rows)


def _row(name: str, result: Result) -> tuple[str, ...]:
    ttft, itl, apart = result.ttft_ms, result.itl_ms, result.out_of_reach.ttft_ms
    return (
        name,
        f"{result.good_share:.1%}",
        f"{result.goodput:.2f}",
        f"{ttft.p50:,.0f} / {ttft.p90:,.0f} / {ttft.p99:,.0f}",
        f"{itl.p50:.1f} / {itl.p90:.1f} / {itl.p99:.1f}",
        f"{result.hit_rate:.1%}",
        f"{result.jain_load:.3f}",
        f"{sum(result.refusals.values()):,}",
        f"{apart.p50 / 1000:,.1f} / {apart.p99 / 1000:,.1f}",
        f"{result.wall_s:.1f}",
    )
