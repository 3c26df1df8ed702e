"""One step computes in a thread while the next is prepared and the one before is told.

Used by the engine's process and by its benchmark, so that both step alike.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from services.worker.engine.engine import Flight, Landing
from services.worker.engine.sampling import Drawn


class Stepped(Protocol):
    """The parts of an engine's step that take turns."""

    def begin(self) -> Flight | None: ...

    def next(self) -> Flight | None: ...

    def compute(self, flight: Flight) -> Drawn | None: ...

    def settle(self, drawn: Drawn | None) -> Landing: ...


class Pipeline:
    """At most one step computes. Not thread-safe."""

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        # Each thread has its own setting; the loader has decided how many torch may use.
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))
        self._computing: Future[Drawn | None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a step computes."""
        return self._computing is not None

    def turn(self) -> Landing | None:
        """Prepares a step; settles the one that computes and starts the next, or starts the first.

        None when nothing was settled. A defect in a step is raised.
        """
        ahead = self._engine.begin()
        if self._computing is None:
            self._start(ahead)
            return None
        landing = self._engine.settle(self._computing.result())
        self._start(self._engine.next())
        return landing

    def close(self) -> None:
        """Waits for the step that computes."""
        self._thread.shutdown()

    def _start(self, flight: Flight | None) -> None:
        self._computing = None if flight is None else self._thread.submit(self._engine.compute, flight)
