"""One step computes while the next is prepared and the one before is told.

On a CPU a thread of its own computes. A device computes by itself: there the next step is launched, too,
before the present one has ended. Used by the engine's process and by its benchmark, so that both step
alike.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Flight, Landing
from services.worker.engine.runner import Pending
from services.worker.engine.sampling import Drawn


class Stepped(Protocol):
    """The parts of an engine's step that take turns."""

    @property
    def ahead(self) -> bool: ...

    def begin(self) -> Flight | None: ...

    def next(self) -> Flight | None: ...

    def compute(self, flight: Flight) -> Drawn | None: ...

    def launch(self, flight: Flight) -> Pending | None: ...

    def wait(self, pending: Pending) -> Drawn: ...

    def settle(self, drawn: Drawn | None) -> Landing: ...


class Pipeline(Protocol):
    """Turns of one engine. Not thread-safe."""

    @property
    def busy(self) -> bool:
        """Whether a step computes."""

    def turn(self) -> Landing | None:
        """Prepares and starts what can be, and settles the oldest step that computes.

        None when nothing was settled. A defect in a step is raised.
        """

    def close(self) -> None:
        """Waits for what computes."""


def depth_of(config: EngineConfig, ahead: bool) -> int:
    """The configured depth; by default 2 on a device that computes by itself, 1 on the host's cores."""
    return config.pipeline_depth or (2 if ahead else 1)


def make_pipeline(engine: Stepped) -> Pipeline:
    """That of the engine's device."""
    return Launches(engine) if engine.ahead else Thread(engine)


class Launches:
    """A device computes what was launched, in order; at most two steps."""

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        self._pending: deque[Pending | None] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    def turn(self) -> Landing | None:
        if self._pending and self._pending[0] is None:
            # Memory ran out, and nothing was launched after it.
            return self._settle()
        flight = self._engine.begin()
        if flight is None:
            return self._settle() if self._pending else None
        if self._pending and flight.looks_back:
            landing = self._settle()
            self._pending.append(self._engine.launch(flight))
            return landing
        self._pending.append(self._engine.launch(flight))
        return self._settle() if len(self._pending) > 1 else None

    def close(self) -> None:
        for pending in self._pending:
            if pending is not None:
                self._engine.wait(pending)

    def _settle(self) -> Landing:
        pending = self._pending.popleft()
        return self._engine.settle(None if pending is None else self._engine.wait(pending))


class Thread:
    """A thread computes, at most one step."""

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        # Each thread has its own setting; the loader has decided how many torch may use.
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))
        self._computing: Future[Drawn | None] | None = None

    @property
    def busy(self) -> bool:
        return self._computing is not None

    def turn(self) -> Landing | None:
        ahead = self._engine.begin()
        if self._computing is None:
            self._start(ahead)
            return None
        landing = self._engine.settle(self._computing.result())
        self._start(self._engine.next())
        return landing

    def close(self) -> None:
        self._thread.shutdown()

    def _start(self, flight: Flight | None) -> None:
        self._computing = None if flight is None else self._thread.submit(self._engine.compute, flight)
