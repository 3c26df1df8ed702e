"""`tokenloom simulate`: what its options ask for, the runs, and the files. The tables are simulate_view's."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.batcher.simulate import law, sweep
from services.batcher.simulate import plot as pictures
from services.batcher.simulate.metrics import Result, Slo
from services.batcher.simulate.policies import POLICIES
from tokenloom.bench.traces import TraceError
from tokenloom.cli import simulate_view as view
from tokenloom.cli.errors import CliError

ALL = "all"
WORKERS_MAX = 1_000
RATES_MAX = 100


def policies_of(name: str) -> tuple[str, ...]:
    """The policies that an option names: one, several with commas, or all. Raises CliError."""
    if name == ALL:
        return tuple(POLICIES)
    names = tuple(dict.fromkeys(part.strip() for part in name.split(",")))
    if unknown := [each for each in names if each not in POLICIES]:
        raise CliError(f"--policy: {unknown[0]!r} is none of {', '.join(POLICIES)}, {ALL}", status=2)
    return names


def rates_of(text: str) -> tuple[float, ...]:
    """The rates that an option lists. Raises CliError."""
    try:
        rates = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise CliError(f"--rate-scale: {text!r} is no list of numbers", status=2) from None
    if any(not 0 < rate <= 1_000 for rate in rates) or len(rates) > RATES_MAX:
        raise CliError(f"--rate-scale: at most {RATES_MAX} rates above 0 and up to 1,000", status=2)
    return rates


def compare(comparison: sweep.Comparison, errors: Console, *, plot: bool) -> sweep.Outcome:
    """Run it, with a bar on `errors`. Raises CliError for a trace that cannot be read, or drawn later on."""
    if plot:
        _check_plot()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = None if comparison.search else len(comparison.policies) * len(comparison.rates)
    processes = min(os.cpu_count() or 1, len(comparison.policies) * max(len(comparison.rates), 2))
    try:
        sweep.Runner(comparison)
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("simulating", total=total)

            def seen(result: Result) -> None:
                said = f"{result.policy} at {result.rate:g}: {result.good_share:.1%} good"
                progress.update(task, advance=1, description=said)

            return sweep.compare(comparison, processes, seen)
    except (OSError, TraceError) as error:
        raise CliError(f"{comparison.trace}: {error}") from None


def _check_plot() -> None:
    """Better before the runs than after them."""
    try:
        pictures.pyplot()
    except pictures.PlotError as error:
        raise CliError(str(error)) from None


def profile(name_or_path: str) -> law.Profile:
    """A profile by name or path. Raises CliError."""
    try:
        return law.load(name_or_path)
    except law.ProfileError as error:
        raise CliError(f"--profile: {error}", status=2) from None


def write(
    outcome: sweep.Outcome, json_path: Path | None, plot_path: Path | None, table_path: Path | None
) -> None:
    """The files that were asked for. Raises CliError when one cannot be written."""
    try:
        if json_path is not None:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=1) + b"\n")
        if table_path is not None:
            table_path.write_text(view.markdown(outcome))
        if plot_path is not None:
            pictures.draw(outcome, plot_path)
    except (OSError, pictures.PlotError) as error:
        raise CliError(str(error)) from None


def comparison(
    trace: Path,
    workers: int,
    profile_name: str,
    rate_scale: str,
    policy: str,
    seed: int,
    slo: Slo,
    *,
    search: bool,
    step_tokens: int | None,
) -> sweep.Comparison:
    """What the options ask for. Raises CliError."""
    rates = rates_of(rate_scale)
    if not rates and not search:
        raise CliError("give --rate-scale, --search-r90 or both", status=2)
    constants = profile(profile_name)
    if step_tokens is not None:
        constants = msgspec.structs.replace(constants, step_tokens_max=step_tokens)
    return sweep.Comparison(
        trace=str(trace),
        profile=constants,
        workers=workers,
        policies=policies_of(policy),
        rates=rates,
        seed=seed,
        slo=slo,
        search=search,
        limits=sweep.default_limits(),
    )
