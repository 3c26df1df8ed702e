"""A benchmark as a person sees it: progress while it runs, then a table. All of it goes to `console`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenloom.bench.report import Prefix, Report
from tokenloom.bench.stats import Level, Record
from tokenloom.bench.words import load_of, ms
from tokenloom.cli.bench_load import OnEnd

REFRESH_S = 0.25
"""The least time between two drawings: they cost CPU that the measured mesh shares."""

_Value = Callable[[Level], str]
"""What a column shows of a level."""


class Display:
    """Progress on a terminal, one line a level elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._drawn_s = 0.0
        self._began_s = 0.0

    def note(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, style="dim")

    def begin(self, title: str, total: int) -> OnEnd:
        """Told of each request that ends."""
        self.end()
        if not self._console.is_terminal:
            return lambda _: None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=self._console,
                             auto_refresh=False, transient=True)  # fmt: skip
        self._bar.start()
        self._began_s = time.monotonic()
        task = self._bar.add_task(title, total=total, rate="")
        counts = [0, 0]

        def on_end(record: Record) -> None:
            counts[0] += 1
            counts[1] += record.output_tokens
            self.progress(int(task), counts[0], counts[1])

        return on_end

    def progress(self, task: int, done: int, tokens: int) -> None:
        """Draws, but not more often than REFRESH_S."""
        now_s = time.monotonic()
        if self._bar is None or now_s - self._drawn_s < REFRESH_S:
            return
        self._drawn_s = now_s
        rate = tokens / max(now_s - self._began_s, 1e-9)
        self._bar.tasks[task].completed = done
        self._bar.tasks[task].fields["rate"] = f"{rate:,.0f} tokens/s"
        self._bar.refresh()

    def measured(self, level: Level) -> None:
        self.end()
        self._console.print(one_line(level), style="dim", soft_wrap=True)

    def end(self) -> None:
        """No bar is left behind."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def one_line(level: Level) -> str:
    """A level, as it is shown when it has ended."""
    errors = f", {level.failed} failed" if level.failed else ""
    return (
        f"{load_of(level)}: {level.output_throughput:,.1f} tokens/s, TTFT p50 {ms(level.ttft_ms, 'p50')}, "
        f"ITL p50 {ms(level.itl_ms, 'p50')}, {level.completed} answers in {level.duration_s:.1f} s{errors}"
    )


def table(report: Report) -> Table:
    """Every level of a report, one row each."""
    levels = report.levels
    shown = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title=_title(report))
    for title, _ in _columns(levels):
        shown.add_column(title, justify="right", no_wrap=True)
    for level in levels:
        shown.add_row(*(value(level) for _, value in _columns(levels)))
    return shown


def remarks(report: Report) -> list[str]:
    """What a reader of the table has to know besides."""
    said = [f"seed {report.seed}; " + ", ".join(f"{name} {value}" for name, value in report.workload.items())]
    for level in report.levels:
        errors = ", ".join(f"{reason} {count}" for reason, count in level.errors.items())
        if errors:
            said.append(f"{load_of(level)}: {level.failed} of {level.num_requests} requests failed: {errors}")
        if level.other_length:
            said.append(f"{load_of(level)}: {level.other_length} answers are not as long as asked")
        if level.held_back:
            said.append(f"{load_of(level)}: {level.held_back} requests waited for a place in flight")
    return said


def prefix_lines(prefix: Prefix) -> list[str]:
    """Cold and warm, and what the one is of the other."""
    return [
        f"cold  TTFT p50 {prefix.cold_ttft_ms.p50:8.1f} ms  p99 {prefix.cold_ttft_ms.p99:8.1f} ms"
        f"  ({prefix.prompt_tokens} prompt tokens, {prefix.pairs} requests)",
        f"warm  TTFT p50 {prefix.warm_ttft_ms.p50:8.1f} ms  p99 {prefix.warm_ttft_ms.p99:8.1f} ms"
        f"  ({prefix.cached_tokens_mean:.0f} of them found cached)",
        f"a prompt with a cached prefix of {prefix.prefix_tokens} tokens starts in "
        f"{prefix.ratio:.3f} of the cold time",
    ]


def engine_line(report: Report) -> str:
    """What an engine in process says of itself; empty for a mesh."""
    return ", ".join(f"{name} {value}" for name, value in report.engine.items())


def _title(report: Report) -> str:
    return f"{report.model} · {report.protocol} · {report.target}"


def _columns(levels: Sequence[Level]) -> list[tuple[str, _Value]]:
    columns: list[tuple[str, _Value]] = [
        ("load", load_of),
        ("tokens/s", lambda level: f"{level.output_throughput:,.1f}"),
        ("req/s", lambda level: f"{level.request_throughput:.2f}"),
    ]
    for name, field in (("TTFT", "ttft_ms"), ("ITL", "itl_ms")):
        for point in ("mean", "p50", "p90", "p99"):
            columns.append((f"{name} {point}", _spread(field, point)))
    columns += [("E2E p50", _spread("e2el_ms", "p50")), ("E2E p99", _spread("e2el_ms", "p99"))]
    if any(level.good_share is not None for level in levels):
        columns.append(("goodput/s", lambda level: f"{level.request_goodput or 0:.2f}"))
        columns.append(("good", lambda level: f"{level.good_share or 0:.0%}"))
    columns.append(("chunks/token", lambda level: f"{level.chunks_per_token:.3f}"))
    if any(level.total_cached_tokens for level in levels):
        columns.append(("cached", lambda level: f"{level.total_cached_tokens:,}"))
    columns.append(("failed", lambda level: str(level.failed)))
    if any(level.client_cpu_s for level in levels):
        columns.append(("client CPU", lambda level: f"{level.client_cpu_s:.2f} s"))
        columns.append(("per token", lambda level: f"{level.client_cpu_us_per_token:.0f} µs"))
    return columns


def _spread(field: str, point: str) -> _Value:
    return lambda level: ms(getattr(level, field), point)
