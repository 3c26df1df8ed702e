"""An engine stepped as its own process steps it, in this process, with an account of where time goes.

The account has the parts of a step: `prepare` (plan and layout), `compute` (the model and the draw; in its
thread when the pipeline is 2 deep; on a device `launch` and `wait` instead), `settle` and `tell`; `turn` is
the whole of what the caller waits for but `tell`, so that what a thread hides is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from services.worker.engine.engine import Engine, Flight, Landing
from services.worker.engine.pipeline import make_pipeline
from services.worker.engine.runner import Pending
from services.worker.engine.sampling import Drawn
from services.worker.protocol import Output, Step, Submit

PARTS = ("prepare", "compute", "launch", "wait", "settle", "tell", "turn")

T = TypeVar("T")


class Account:
    """An engine whose parts are timed."""

    def __init__(self, engine: Engine) -> None:
        self.parts_ns = dict.fromkeys(PARTS, 0)
        """Nanoseconds of each part since the beginning."""
        self._engine = engine

    def begin(self) -> Flight | None:
        return self.timed("prepare", self._engine.begin)

    def next(self) -> Flight | None:
        return self._engine.next()

    def compute(self, flight: Flight) -> Drawn | None:
        return self.timed("compute", lambda: self._engine.compute(flight))

    @property
    def ahead(self) -> bool:
        return self._engine.ahead

    def launch(self, flight: Flight) -> Pending | None:
        return self.timed("launch", lambda: self._engine.launch(flight))

    def wait(self, pending: Pending) -> Drawn:
        return self.timed("wait", lambda: self._engine.wait(pending))

    def settle(self, drawn: Drawn | None) -> Landing:
        return self.timed("settle", lambda: self._engine.settle(drawn))

    def timed(self, part: str, work: Callable[[], T]) -> T:
        began_ns = time.perf_counter_ns()
        result = work()
        self.parts_ns[part] += time.perf_counter_ns() - began_ns
        return result


class Stepper:
    """What the driver drives."""

    def __init__(self, engine: Engine, depth: int) -> None:
        self._engine = engine
        self._account = Account(engine)
        self._pipeline = make_pipeline(self._account) if depth > 1 else None

    @property
    def parts_ns(self) -> dict[str, int]:
        """Nanoseconds of each part since the beginning."""
        return self._account.parts_ns

    @property
    def idle(self) -> bool:
        return self._engine.idle

    def submit(self, command: Submit) -> Output | None:
        return self._engine.submit(command)

    def step(self) -> Step:
        """The next step that ends; empty when none did."""
        turn = self._in_turn if self._pipeline is None else self._pipeline.turn
        landing = self._account.timed("turn", turn)
        if landing is None:
            return Step([], self._engine.load())
        return self._account.timed("tell", lambda: self._engine.tell(landing))

    def close(self) -> None:
        """Ends the thread."""
        if self._pipeline is not None:
            self._pipeline.close()

    def _in_turn(self) -> Landing | None:
        flight = self._account.begin()
        return None if flight is None else self._account.settle(self._account.compute(flight))
