"""One model version that is resident on this worker, or on its way, or leaving, or failed.

State alone: what it shows is read by reports, metrics and the servicer; `models.py` moves it along.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from services.worker.front.engine import Engine, EngineState
from services.worker.front.ports import ModelVersion
from services.worker.front.reservation import Reservation
from services.worker.front.residency import Use
from tokenloom.kit.errors import CallError


class Stage(Enum):
    """A model's life on this worker."""

    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Resident:
    """One version and its engine."""

    def __init__(
        self,
        version: ModelVersion,
        engine: Engine,
        reservation: Reservation | None = None,
        *,
        min_dwell_s: float = 0.0,
        configured: bool = False,
    ) -> None:
        self.version = version
        self.engine = engine
        self.reservation = reservation or Reservation()
        """What its engine may take."""
        self.configured = configured
        """The settings name it: the worker is not ready before this model is."""
        self.fetched = 0.0
        """Share of the files that is here, 0 to 1."""
        self.fetching = True
        self.draining = False
        self.failure: CallError | None = None
        self.granted = asyncio.Event()
        """Set when its memory is reserved: the engine may start."""
        self.settled = asyncio.Event()
        """Set when the first load succeeded or failed for good."""
        self.hurried = asyncio.Event()
        """Set when somebody waits for its memory."""
        self.released = asyncio.Event()
        """Set when its engine is gone and its memory was given back."""
        self.life: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self._min_dwell_s = min_dwell_s

    @property
    def stage(self) -> Stage:
        """What the load report says of it."""
        if self.draining:
            return Stage.DRAINING
        if self.failure is not None or self.engine.state is EngineState.FAILED:
            return Stage.FAILED
        if self.fetching:
            return Stage.FETCHING
        return Stage.READY if self.engine.state is EngineState.READY else Stage.LOADING

    @property
    def progress(self) -> float:
        """0 to 1 of the present stage."""
        return self.fetched if self.fetching else self.engine.progress

    @property
    def error(self) -> CallError | None:
        """Why it failed, when it did."""
        return self.failure or self.engine.error

    @property
    def tried_again(self) -> bool:
        """Whether a failure is one that passes, of a model that the settings want."""
        return self.configured and self.error is not None and self.error.retriable

    @property
    def reserved_bytes(self) -> int:
        """What it has of the worker's memory now; 0 while it waits for that."""
        held = self.granted.is_set() and not self.released.is_set()
        return self.reservation.total_bytes if held else 0

    @property
    def use(self) -> Use:
        """How it was used."""
        engine = self.engine
        return Use(engine.ready_s, engine.started_s, engine.ended_s, engine.busy)

    @property
    def dwell_left_s(self) -> float:
        """How long it may not be evicted yet."""
        if self.stage in (Stage.DRAINING, Stage.FAILED):
            return 0.0
        return self.use.dwell_left_s(self._min_dwell_s, self.engine.now_s())

    @property
    def idle_s(self) -> float:
        """Since its last sequence ended, or since it was ready; 0 while one is here."""
        return self.use.idle_s(self.engine.now_s())

    @property
    def context_length(self) -> int:
        """Tokens that prompt and output may be together: the model's bound, and the cache's."""
        ready = self.engine.ready
        if ready is None:
            return self.version.context_length
        return min(ready.context_length, ready.total_blocks * ready.block_tokens)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ready = self.engine.ready
        return self.version.vocab_size if ready is None else ready.vocab_size
