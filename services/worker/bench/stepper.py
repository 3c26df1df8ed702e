"""An engine stepped as its own process steps it, in this process, with an account of where time goes.

With a `pipeline_depth` of 2 a thread computes a step while the next one is prepared, so that figures
are those of the engine that serves, and not of a simpler loop. The account has the parts of a step:
`prepare` (plan and layout), `compute` (the model and the draw; in its thread), `wait` (what of it nothing
else hid), `settle` and `tell`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from services.worker.engine.engine import Engine
from services.worker.engine.host import use_threads
from services.worker.protocol import Output, Step, Submit

PARTS = ("prepare", "compute", "wait", "settle", "tell")

T = TypeVar("T")


class Stepper:
    """What the driver drives."""

    def __init__(self, engine: Engine, depth: int, threads: int) -> None:
        self.parts_ns = dict.fromkeys(PARTS, 0)
        """Nanoseconds of each part since the beginning."""
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "compute", use_threads, (threads,)) if depth > 1 else None
        self._computing: Future[Any] | None = None

    @property
    def idle(self) -> bool:
        return self._engine.idle

    def submit(self, command: Submit) -> Output | None:
        return self._engine.submit(command)

    def step(self) -> Step:
        """The next step that ends; empty when there is nothing to do."""
        ahead = self._timed("prepare", self._engine.begin)
        if self._computing is None:
            if ahead is None:
                return Step([], self._engine.load())
            self._start(ahead)
        drawn = self._timed("wait", self._result)
        landing = self._timed("settle", self._engine.settle, drawn)
        self._computing = None
        if (following := self._engine.next()) is not None:
            self._start(following)
        return self._timed("tell", self._engine.tell, landing)

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _start(self, flight: Any) -> None:
        if self._thread is not None:
            self._computing = self._thread.submit(self._timed, "compute", self._engine.compute, flight)
            return
        self._computing = Future()
        self._computing.set_result(self._timed("compute", self._engine.compute, flight))

    def _result(self) -> Any:
        assert self._computing is not None
        return self._computing.result()

    def _timed(self, part: str, work: Callable[..., T], *arguments: Any) -> T:
        began_ns = time.perf_counter_ns()
        result = work(*arguments)
        self.parts_ns[part] += time.perf_counter_ns() - began_ns
        return result
