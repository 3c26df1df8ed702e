"""Benchmarks as pictures (PNG). All axes of quantities begin at zero; what is missing is left out.

matplotlib is an optional dependency: it is imported here alone, and only when a picture is wanted.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenloom.bench.report import Report
from tokenloom.bench.stats import CDF_POINTS, Level, Spread
from tokenloom.cli.errors import CliError

DPI = 130
PACKAGE = "matplotlib"
COLOURS = ("#2563eb", "#dc6803", "#059669", "#9333ea", "#64748b", "#be123c")
POINTS = (("p50", "-", "o"), ("p90", "--", "s"), ("p99", ":", "^"))


def check() -> None:
    """Raises CliError when there is nothing to draw with: better before a measurement than after it."""
    _pyplot()


def draw(report: Report, path: Path) -> None:
    """Over the load when there are several levels, otherwise how the times are spread. Raises CliError."""
    if not report.levels:
        raise CliError("--plot: there are no levels to draw")
    title = f"{report.model} · {report.protocol} · {_place(report.target)}"
    if len(report.levels) > 1:
        draw_levels({"": report.levels}, title, path, facts=_facts(report))
    else:
        _draw_cdf(report.levels[0], title, path, _facts(report))


def draw_levels(series: Mapping[str, Sequence[Level]], title: str, path: Path, facts: str = "") -> None:
    """Throughput, TTFT and ITL of one or several systems over the load. Raises CliError."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    first = next(iter(series.values()))
    label = "requests in flight" if first[0].request_rate is None else "requests per second"
    for colour, (name, levels) in zip(COLOURS, series.items(), strict=False):
        places = [_place_of(levels, level) for level in levels]
        rates = [level.output_throughput for level in levels]
        axes[0].plot(places, rates, marker="o", color=colour, label=name)
        _write_values(axes[0], places, rates, colour)
        for axis, field in ((axes[1], "ttft_ms"), (axes[2], "itl_ms")):
            for point, line, marker in POINTS if len(series) == 1 else POINTS[::2]:
                values = [_at(getattr(level, field), point) for level in levels]
                axis.plot(places, values, line, marker=marker, markersize=4, color=colour,
                          label=f"{name} {point}".strip())  # fmt: skip
    for axis, what, unit in zip(
        axes,
        ("Output throughput", "Time to first token (TTFT)", "Inter-token latency (ITL)"),
        ("tokens/s", "ms", "ms"),
        strict=True,
    ):
        _dress(axis, what, label, unit)
        _ticks(axis, [_load(level) for level in first])
    _finish(plt, figure, title, facts, path)


def draw_bars(
    names: Sequence[str], groups: Mapping[str, Sequence[float]], title: str, unit: str, path: Path, facts: str
) -> None:
    """Groups of bars with their values on top: `groups[system][i]` belongs to `names[i]`. Raises CliError."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(max(6.0, 1.8 * len(names) + 2), 4.8), layout="constrained")
    width = 0.8 / max(1, len(groups))
    for number, (colour, (name, values)) in enumerate(zip(COLOURS, groups.items(), strict=False)):
        places = [at + (number - (len(groups) - 1) / 2) * width for at in range(len(names))]
        bars = axis.bar(places, values, width * 0.92, color=colour, label=name)
        axis.bar_label(bars, fmt="{:,.3g}", fontsize=8, padding=2)
    _dress(axis, title, "", unit)
    axis.set_xticks(range(len(names)), names)
    # Room for the legend above the highest bar.
    axis.set_ylim(0, 1.3 * max((value for values in groups.values() for value in values), default=1) or 1)
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=len(groups))
    _finish(plt, figure, "", facts, path)


def _draw_cdf(level: Level, title: str, path: Path, facts: str) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    shares = [100 * point / (CDF_POINTS - 1) for point in range(CDF_POINTS)]
    for axis, values, what, colour in (
        (axes[0], level.ttft_ms_cdf, "Time to first token (TTFT)", COLOURS[0]),
        (axes[1], level.itl_ms_cdf, "Inter-token latency (ITL)", COLOURS[1]),
    ):
        if values:
            axis.plot(values, shares, color=colour, label=f"p50 {values[50]:.1f} ms, p99 {values[99]:.1f} ms")
        _dress(axis, what, "ms", "share of values at or below, %")
        axis.set_ylim(0, 100)
    load = f"{level.max_concurrency} in flight"
    if level.request_rate is not None:
        load = f"{level.request_rate:.3g} requests/s"
    title = f"{title}\n{load}: {level.output_throughput:,.1f} tokens/s, {level.completed} answers"
    _finish(plt, figure, title, facts, path)


def _dress(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0) if x == "ms" else None
    axis.grid(True, axis="y" if x != "ms" else "both", color="#e2e8f0", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if any(axis.get_legend_handles_labels()[1]):
        axis.legend(frameon=False, fontsize=8, loc="lower right" if x == "ms" else "upper left")


def _write_values(axis: Any, places: Sequence[int], values: Sequence[float], colour: str) -> None:
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:,.0f}", (place, value), textcoords="offset points", xytext=(0, 6),
                      ha="center", fontsize=8, color=colour)  # fmt: skip


def _ticks(axis: Any, loads: Sequence[str]) -> None:
    """Levels are usually 1, 8, 32, 64: evenly spaced, so that none hides in a corner."""
    axis.set_xticks(range(len(loads)), loads)


def _place_of(levels: Sequence[Level], level: Level) -> int:
    return next(place for place, other in enumerate(levels) if other is level)


def _load(level: Level) -> str:
    return str(level.max_concurrency) if level.request_rate is None else f"{level.request_rate:.3g}"


def _at(spread: Spread | None, point: str) -> float:
    return float("nan") if spread is None else float(getattr(spread, point))


def _place(target: str) -> str:
    return target if "://" in target else Path(target).name


def _facts(report: Report) -> str:
    machine = report.machine
    if not machine:
        return ""
    work = ", ".join(f"{name} {value}" for name, value in report.workload.items())
    return f"{machine.get('cpu')}, {machine.get('cores')} cores · commit {machine.get('commit')} · {work}"


def _finish(plt: Any, figure: Any, title: str, facts: str, path: Path) -> None:
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    if facts:
        figure.supxlabel(facts, fontsize=7.5, color="#475569")
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise CliError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        importlib.import_module(PACKAGE).use("Agg")
        return importlib.import_module(f"{PACKAGE}.pyplot")
    except ImportError:
        raise CliError(f"--plot needs {PACKAGE}: pip install {PACKAGE}") from None
