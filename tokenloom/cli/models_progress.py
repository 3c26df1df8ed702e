"""Progress of long work for people: bars on a terminal, now and then a line elsewhere.

Knows stages and amounts, not what is done. Bound: a line each `LINE_EVERY_S` and one for each stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tokenloom.cli.columns import duration

LINE_EVERY_S = 5.0
SPEED_WINDOW_S = 30.0
"""The rate is that of the last so many seconds."""
LABELS = {
    "download": "downloading",
    "read": "reading",
    "convert": "converting",
    "hash": "hashing",
    "store": "storing",
    "verify": "verifying",
}


def size(count: float) -> str:
    """`269.1 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class _Stages:
    """A bar for each stage. `hidden`: say nothing, for programs that read the result."""

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        hidden: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._plain = not hidden and not console.is_terminal
        self._clock = clock
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            *columns,
            console=console,
            disable=hidden or not console.is_terminal,
            get_time=clock,
            speed_estimate_period=SPEED_WINDOW_S,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said_s = clock()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bars.stop()

    def _show(self, stage: str, label: str, done: float, total: float | None) -> None:
        begun = stage not in self._tasks
        if begun:
            self._tasks[stage] = self._bars.add_task(label, total=total)
        task_id = self._tasks[stage]
        self._bars.update(task_id, description=label, completed=done, total=total)
        if not self._plain:
            return
        now_s = self._clock()
        if begun:
            self._say(f"{label} …")
        elif now_s - self._said_s >= LINE_EVERY_S:
            task = next(task for task in self._bars.tasks if task.id == task_id)
            self._say(f"{label} {self._words(task)}")

    def _say(self, line: str) -> None:
        self._said_s = self._clock()
        self._console.print(line, soft_wrap=True, markup=False)

    def _words(self, task: Task) -> str:
        raise AssertionError("a progress says what it counts")


class BytesProgress(_Stages):
    """Stages that count bytes: how many of how many, how fast, and the time left."""

    def __init__(
        self, console: Console, *, hidden: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        columns = (
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )
        super().__init__(console, *columns, hidden=hidden, clock=clock)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """The stage has come so far; `total_bytes` is 0 while it is not known."""
        label = f"{LABELS.get(stage, stage):<11}" if not self._plain else LABELS.get(stage, stage)
        self._show(stage, label, done_bytes, total_bytes or None)

    def _words(self, task: Task) -> str:
        parts = [size(task.completed)]
        if task.total:
            parts = [f"{task.percentage:.0f}%: {size(task.completed)} of {size(task.total)}"]
        if task.speed:
            parts.append(f"{size(task.speed)}/s")
        if task.time_remaining is not None:
            parts.append(f"{duration(task.time_remaining)} left")
        return ", ".join(parts)


class SharesProgress(_Stages):
    """Stages of which only the share done is known."""

    def __init__(
        self, console: Console, *, hidden: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        columns = (TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        super().__init__(console, *columns, hidden=hidden, clock=clock)

    def show(self, stage: str, done: float) -> None:
        """The stage has come so far, 0 to 1."""
        self._show(stage, stage, done, 1.0)

    def _words(self, task: Task) -> str:
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return f"{task.percentage:.0f}%{left}"
