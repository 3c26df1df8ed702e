"""`python -m tools.bench_batcher CASE`: the real batcher behind the real Envoy, with sim workers.

    pick      --workers 100 --rate 300 --seconds 20    what a pick takes, and what the batcher burns for it
    burst     --requests 1400                          all at once: served, and none past the batcher
    behind    --queued 500                             an interactive request behind queued batch ones
    fairness  --case backlog|weights|flood             who is served how much

Each case starts a mesh of its own and stops it. A table goes to standard output, JSON to `--json`. The
exit status is 1 when a bar is missed. On a machine that does other work too (`foreign_cores`) latencies
say little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools import bench_batcher_cases as cases
from tools.bench_batcher_cases import Bar, Case, Figures
from tools.bench_batcher_mesh import Outcome, run

COLUMNS = 110
SCHEMA = "tokenloom.bench.batcher/1"
Judge = Callable[[Outcome], tuple[Figures, list[Bar]]]

FAIRNESS: dict[str, tuple[Callable[[], Case], Judge]] = {
    "backlog": (cases.backlog, cases.backlog_figures),
    "weights": (cases.weights, cases.weights_figures),
    "flood": (cases.flood, cases.flood_figures),
}


def main() -> None:
    """Exits with 1 when a bar is missed."""
    options = _options()
    case, judge = _chosen(options)
    with tempfile.TemporaryDirectory(prefix="bench-batcher-") as scratch:
        folder = options.folder or Path(scratch)
        outcome = asyncio.run(run(case.setup, case.asks, case.window, folder))
    figures, bars = judge(outcome)
    missed = [name for name, sign, bound in bars if not holds(figures[name], sign, bound)]
    if options.json is not None:
        report = {"schema": SCHEMA, "case": case.name, "setup": case.facts, "figures": figures}
        whole = report | {"bars": bars, "missed": missed}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    _show(case, figures, bars)
    if missed:
        sys.exit(1)


def holds(value: object, sign: str, bound: float) -> bool:
    """False for what is no number, and for NaN."""
    if not isinstance(value, (int, float)):
        return False
    return value <= bound if sign == "<=" else value >= bound


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.bench_batcher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="where the figures go too")
    parser.add_argument("--folder", type=Path, help="keep logs and Envoy's files here")
    of = parser.add_subparsers(dest="case", required=True)
    pick = of.add_parser("pick")
    pick.add_argument("--workers", type=int, default=100)
    pick.add_argument("--rate", type=float, default=300.0, help="requests a second")
    pick.add_argument("--seconds", type=float, default=20.0, help="measured, after the warm-up")
    pick.add_argument("--warm-s", type=float, default=3.0)
    pick.add_argument("--step-ms", type=float, default=200.0, help="of the sim engines")
    pick.add_argument("--tokens", type=int, default=8, help="of each answer")
    burst = of.add_parser("burst")
    burst.add_argument("--workers", type=int, default=10)
    burst.add_argument("--requests", type=int, default=1400)
    burst.add_argument("--sequences", type=int, default=32, help="places of a worker")
    behind = of.add_parser("behind")
    behind.add_argument("--queued", type=int, default=500)
    fairness = of.add_parser("fairness")
    fairness.add_argument("--case", dest="fairness", choices=sorted(FAIRNESS), required=True)
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> tuple[Case, Judge]:
    if options.case == "pick":
        law = (options.warm_s, options.step_ms, options.tokens)
        return cases.pick(options.workers, options.rate, options.seconds, *law), cases.pick_figures
    if options.case == "burst":
        return cases.burst(options.workers, options.requests, options.sequences), cases.burst_figures
    if options.case == "behind":
        return cases.behind(options.queued), cases.behind_figures
    make, judge = FAIRNESS[options.fairness]
    return make(), judge


def _show(case: Case, figures: Figures, bars: list[Bar]) -> None:
    table = Table(title=f"{case.name}: " + ", ".join(f"{k} {_text(v)}" for k, v in case.facts.items()))
    for column in ("figure", "value", "bar"):
        table.add_column(column, overflow="fold")
    wanted = {name: (sign, bound) for name, sign, bound in bars}
    for name, value in figures.items():
        sign, bound = wanted.get(name, ("", 0.0))
        mark = "" if not sign else "ok " if holds(value, sign, bound) else "MISSED "
        table.add_row(name, _text(value), f"{mark}{sign} {bound:g}" if sign else "")
    Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS).print(table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
