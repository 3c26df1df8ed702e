"""A comparison as one picture (PNG): shares, latencies, hit rates and balance over the rate, and queues.

matplotlib is an optional dependency: it is imported here alone, and only when a picture is wanted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from services.batcher.simulate.metrics import Result
from services.batcher.simulate.policies import POLICIES
from services.batcher.simulate.sweep import GOOD_SHARE_MIN, Outcome

DPI = 130
PACKAGE = "matplotlib"
COLOURS = ("#2563eb", "#cbd5e1", "#a8a29e", "#dc6803", "#d946ef", "#059669", "#65a30d", "#be123c")
BOUND_COLOUR = "#0f172a"
LATENCY_CAP = 3.0
"""Latencies are drawn up to so many times the SLO: what is beyond is out of the picture."""


class PlotError(RuntimeError):
    """There is nothing to draw with."""


def draw(outcome: Outcome, path: Path) -> None:
    """Raises PlotError without matplotlib, OSError when the file cannot be written."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 4, figsize=(19, 9), layout="constrained")
    slo = outcome.slo
    _shares(axes[0][0], outcome)
    _over_rate(axes[0][1], outcome, lambda result: result.ttft_ms.p50, ":", " p50")
    _over_rate(axes[0][1], outcome, lambda result: result.ttft_ms.p90, "-", "")
    _finish(axes[0][1], "Time to first token, p50 (dotted) and p90", "ms", slo.ttft_s * 1000)
    _over_rate(axes[0][2], outcome, lambda result: result.ttft_ms.p99, "-", "")
    _finish(axes[0][2], "Time to first token, p99", "ms", slo.ttft_s * 1000)
    _over_rate(axes[0][3], outcome, lambda result: result.itl_ms.p50, ":", " p50")
    _over_rate(axes[0][3], outcome, lambda result: result.itl_ms.p90, "-", "")
    _finish(axes[0][3], "Mean inter-token latency, p50 (dotted) and p90", "ms", slo.itl_s * 1000)
    _over_rate(axes[1][0], outcome, lambda result: result.goodput, "-", "")
    _bound(axes[1][0], {rate: at.goodput for rate, at in outcome.bound.rates.items()})
    _finish(axes[1][0], "Goodput", "good requests/s")
    _over_rate(axes[1][1], outcome, lambda result: 100 * result.hit_rate, "-", "")
    _finish(axes[1][1], "Prompt tokens found in a cache", "%")
    _over_rate(axes[1][2], outcome, lambda result: result.jain_load, "-", "")
    _finish(axes[1][2], "Jain index of the workers' busy time", "")
    _queues(axes[1][3], outcome)
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.suptitle(_title(outcome), fontsize=12, fontweight="bold")
    try:
        figure.savefig(path, dpi=DPI)
    finally:
        plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises PlotError."""
    try:
        importlib.import_module(PACKAGE).use("Agg")
        return importlib.import_module(f"{PACKAGE}.pyplot")
    except ImportError:
        raise PlotError(f"--plot needs {PACKAGE}: pip install {PACKAGE}") from None


def _shares(axis: Any, outcome: Outcome) -> None:
    _over_rate(axis, outcome, lambda result: 100 * result.good_share, "-", "", named=True)
    _bound(axis, {rate: 100 * at.good_share for rate, at in outcome.bound.rates.items()})
    axis.axhline(100 * GOOD_SHARE_MIN, color="#64748b", linewidth=0.8, linestyle="--")
    _finish(axis, "Requests served in time", "% of those in reach")
    axis.set_ylim(0, 102)


def _over_rate(
    axis: Any,
    outcome: Outcome,
    value: Callable[[Result], float],
    line: str,
    suffix: str,
    *,
    named: bool = False,
) -> None:
    for colour, (name, each) in zip(_colours(outcome), outcome.policies.items(), strict=True):
        results = sorted(each.rates.values(), key=lambda result: result.rate)
        label = f"{name}{suffix}" + (f" (R90 {each.r90:.2f})" if each.r90 is not None else "")
        width = 2.4 if name == "tokenloom" else 1.3
        axis.plot([result.rate for result in results], [value(result) for result in results], line,
                  marker="o", markersize=3, color=colour, linewidth=width,
                  label=label if named else None)  # fmt: skip


def _bound(axis: Any, values: Mapping[str, float]) -> None:
    points = sorted((float(rate), value) for rate, value in values.items())
    axis.plot(*zip(*points, strict=True), "--", color=BOUND_COLOUR, linewidth=1.3, label="upper bound")


def _queues(axis: Any, outcome: Outcome) -> None:
    """At the highest rate that all policies ran at."""
    common = set.intersection(*(set(each.rates) for each in outcome.policies.values()))
    if not common:
        axis.set_axis_off()
        return
    rate = max(common, key=float)
    for colour, (name, each) in zip(_colours(outcome), outcome.policies.items(), strict=True):
        series = each.rates[rate].series
        waiting = [held + queued for held, queued in zip(series.held, series.queued, strict=True)]
        axis.plot(series.at_s, waiting, color=colour, linewidth=1.5 if name == "tokenloom" else 0.8)
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(bottom=0)
    axis.set_title(f"Requests waiting, at rate {rate}", fontsize=10)
    axis.set_xlabel("s")
    axis.grid(alpha=0.25)


def _finish(axis: Any, title: str, unit: str, slo: float | None = None) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("multiple of the recorded rate")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=0)
    if slo is not None:
        axis.axhline(slo, color="#64748b", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, min(axis.get_ylim()[1], LATENCY_CAP * slo))


def _colours(outcome: Outcome) -> list[str]:
    """A policy has its colour whatever it is drawn with."""
    places = {name: place for place, name in enumerate(POLICIES)}
    return [COLOURS[places[name] % len(COLOURS)] for name in outcome.policies]


def _title(outcome: Outcome) -> str:
    slo = outcome.slo
    good = f"TTFT ≤ {slo.ttft_s:g} s and mean ITL ≤ {slo.itl_s * 1000:g} ms"
    return f"{outcome.trace} · {outcome.workers} simulated workers ({outcome.profile.name}) · {good}"
