"""`python -m services.batcher.bench FILE`: the batcher as it is, with its core's time measured.

Every public method of the scheduler is wrapped; on SIGUSR1 the sums so far are written to FILE as
`{"method": [calls, nanoseconds]}`. The time is the thread's own CPU time, so that what else the machine
does is not counted; reading it costs about half a microsecond a call. Production runs without this.
"""

from __future__ import annotations

import functools
import inspect
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.batcher.app import build
from services.batcher.core.scheduler import Scheduler
from services.batcher.settings import BatcherSettings
from tokenloom.kit.service import run


class CoreTimes:
    """CPU time inside the scheduler, by the method that was called from outside."""

    def __init__(self) -> None:
        self.sums: dict[str, list[int]] = {}
        self._inside = False

    def wrap(self, cls: type) -> None:
        """Measure every public method of `cls` from now on; calls among them count once."""
        for name, function in inspect.getmembers(cls, inspect.isfunction):
            if not name.startswith("_"):
                setattr(cls, name, self._timed(name, function))

    def write(self, path: Path) -> None:
        """Whole or not at all: written beside, then moved."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.sums))
        part.replace(path)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        tally = self.sums.setdefault(name, [0, 0])

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            began_ns = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                tally[1] += time.thread_time_ns() - began_ns
                tally[0] += 1
                self._inside = False

        return timed


def main() -> None:
    """Runs until a signal ends it."""
    times, path = CoreTimes(), Path(sys.argv[1])
    times.wrap(Scheduler)
    signal.signal(signal.SIGUSR1, lambda *_: times.write(path))
    run("batcher", BatcherSettings, build)


if __name__ == "__main__":
    main()
