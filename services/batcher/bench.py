"""`python -m services.batcher.bench FILE`: the batcher as it is, with its core's time measured.

Every public method of the scheduler is measured from outside; on SIGUSR1 the sums so far are written to
FILE as `{"method": [calls, nanoseconds]}`. The time is the thread's own CPU time, so that what else the
machine does is not counted. Reading that clock is a system call, whose cost depends on what else runs: now
and then it is read twice in a row, and what that took is taken off each call. Production runs without this.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.batcher import app
from services.batcher.core.scheduler import Scheduler
from services.batcher.settings import BatcherSettings
from tokenloom.kit.service import run

CLOCK_EVERY = 8
"""Calls between two looks at what the clock itself takes."""


class CoreTimes:
    """CPU time inside the scheduler, by the method that was called from outside."""

    def __init__(self) -> None:
        self.sums: dict[str, list[int]] = {}
        self._calls = 0
        self._clock = [0, 0]

    def wrap(self, cls: type) -> Callable[..., Any]:
        """Makes what `cls` makes, with every public method measured."""

        def make(*args: Any, **kwargs: Any) -> _Timed:
            return _Timed(cls(*args, **kwargs), self._timed)

        return make

    def write(self, path: Path) -> None:
        """Whole or not at all: written beside, then moved."""
        part = path.with_name(path.name + ".part")
        looks, took_ns = self._clock
        clock_ns = took_ns / looks if looks else 0.0
        net = {name: [calls, round(ns - calls * clock_ns)] for name, (calls, ns) in self.sums.items()}
        part.write_text(json.dumps(net))
        part.replace(path)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        tally = self.sums.setdefault(name, [0, 0])

        def timed(*args: Any, **kwargs: Any) -> Any:
            began_ns = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                tally[1] += time.thread_time_ns() - began_ns
                tally[0] += 1
                self._calls += 1
                if self._calls % CLOCK_EVERY == 0:
                    self._look_at_clock()

        return timed

    def _look_at_clock(self) -> None:
        began_ns = time.thread_time_ns()
        self._clock[1] += time.thread_time_ns() - began_ns
        self._clock[0] += 1


class _Timed:
    """Stands in for one object: a compiled class does not let its methods be replaced."""

    def __init__(self, inner: Any, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._inner = inner
        for name in dir(type(inner)):
            if not name.startswith("_") and callable(getattr(type(inner), name)):
                setattr(self, name, timed(name, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def main() -> None:
    """Runs until a signal ends it."""
    times, path = CoreTimes(), Path(sys.argv[1])
    vars(app)["Scheduler"] = times.wrap(Scheduler)
    signal.signal(signal.SIGUSR1, lambda *_: times.write(path))
    run("batcher", BatcherSettings, app.build)


if __name__ == "__main__":
    main()
