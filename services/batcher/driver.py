"""Performs what the scheduler decides: wakes held streams, keeps its timer, tells metrics and watchers.

It decides nothing about requests. Everything here runs on one event loop and no method that the
ext_proc streams call ever waits. Bounds: those of the scheduler's `Limits`; one timer in all;
`watchers_max` in `watchers.py`.
"""

from __future__ import annotations

import asyncio

from services.batcher.core.messages import (
    Dispatch,
    Effect,
    LoadModel,
    LoadReport,
    Reject,
    Request,
    ServedElsewhere,
    Usage,
    Verdict,
    WorkerTurned,
)
from services.batcher.core.ports import ModelLoader
from services.batcher.core.scheduler import Scheduler
from services.batcher.core.snapshot import Place, Snapshot
from services.batcher.metrics import BatcherMetrics
from services.batcher.stay import Stay
from services.batcher.watchers import Watchers
from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

TIMER_MIN_S = 0.01
"""What is due within it is done together: with a hundred workers some silence is always about to be due."""

log = get_logger(__name__)


class Driver:
    """The scheduler, running: the `FleetListener` of the workers' streams, the `LoadListener` of loads."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        metrics: BatcherMetrics,
        loader: ModelLoader,
        *,
        watchers_max: int,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._loader = loader
        self._held: dict[int, Stay] = {}
        """Those not decided yet, by ticket."""
        self._silent: set[str] = set()
        """Endpoints of stale workers, which are as many as there are workers at most."""
        self._tickets = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._closed = False
        self._emptied = asyncio.Event()
        self.watchers = Watchers(self.place_of, watchers_max)
        self.revision = 0
        """Grows with everything that happens."""

    # Requests.

    def arrived(self, request: Request) -> Stay:
        """A request wants a worker; it may be decided at once."""
        now_ns = self._clock.unix_ns()
        self._tickets += 1
        stay = Stay(self._tickets, request, now_ns)
        self._held[stay.ticket] = stay
        self._perform(self._scheduler.request_arrived(stay.ticket, request, self._clock.monotonic()), now_ns)
        self.watchers.arrived(request.request_id)
        return stay

    def hold_limit_s(self, stay: Stay) -> float:
        """The longest that it may be held from now on."""
        return self._scheduler.hold_limit_s(stay.request, self._clock.monotonic())

    def answered(self, stay: Stay, served_by: str) -> None:
        """Response headers came by."""
        if self._scheduler.holds(stay.ticket):
            begun_ns = self._clock.unix_ns()
            now = self._clock.monotonic()
            self._perform(self._scheduler.response_seen(stay.ticket, served_by, now), begun_ns)
            if not self._scheduler.holds(stay.ticket):
                self._left(stay)

    def ended(self, stay: Stay, usage: Usage | None) -> None:
        """Its stream is over, whatever the cause. Also called for a request that was refused."""
        if self._scheduler.holds(stay.ticket):
            begun_ns = self._clock.unix_ns()
            now = self._clock.monotonic()
            self._perform(self._scheduler.stream_ended(stay.ticket, usage, now), begun_ns)
            if stay.decision is None:
                self._left(stay)
            else:
                self._metrics.ended(stay.request, usage)

    def _left(self, stay: Stay) -> None:
        """It went while it was waiting."""
        del self._held[stay.ticket]
        self._metrics.cancelled(stay.request)
        self.watchers.left(stay.request.request_id)
        self._note_emptied()

    # Workers: the FleetListener.

    def found(self, endpoint: str) -> None:
        self._scheduler.worker_found(endpoint)
        log.info("worker found", worker=endpoint)

    def reported(self, endpoint: str, report: LoadReport) -> None:
        now_ns = self._clock.unix_ns()
        self._metrics.reports.inc()
        self._perform(self._scheduler.load_reported(endpoint, report, self._clock.monotonic()), now_ns)

    def lost(self, endpoint: str) -> None:
        now_ns = self._clock.unix_ns()
        self._perform(self._scheduler.worker_lost(endpoint, self._clock.monotonic()), now_ns)

    def removed(self, endpoint: str) -> None:
        now_ns = self._clock.unix_ns()
        self._perform(self._scheduler.worker_removed(endpoint, self._clock.monotonic()), now_ns)
        log.info("worker removed", worker=endpoint)

    def load_ended(self, endpoint: str, model: str, verdict: Verdict | None) -> None:
        now_ns = self._clock.unix_ns()
        self._metrics.loads.labels(
            "loaded" if verdict is None else "refused", verdict.reason if verdict else ""
        ).inc()
        self._perform(self._scheduler.load_ended(endpoint, model, verdict, self._clock.monotonic()), now_ns)

    # The end.

    def drain(self) -> int:
        """Refuse new requests from now on; how many still wait."""
        self._scheduler.drain()
        return self._scheduler.waiting

    async def drained(self) -> None:
        """Returns when nobody waits any more."""
        while self._held:
            self._emptied.clear()
            await self._emptied.wait()

    def close(self) -> None:
        """Refuse what still waits, and stop the timer for good."""
        self._closed = True
        self._perform(self._scheduler.close(self._clock.monotonic()), self._clock.unix_ns())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # What others may know.

    @property
    def draining(self) -> bool:
        return self._scheduler.draining

    def place_of(self, request_id: str) -> Place | None:
        """Where the newest request of this id is."""
        return self._scheduler.place_of(request_id, self._clock.monotonic())

    def snapshot(self, leases_max: int) -> Snapshot:
        """Everything, for people."""
        return self._scheduler.snapshot(self._clock.monotonic(), leases_max)

    # Inside.

    def _perform(self, effects: list[Effect], begun_ns: int) -> None:
        self.revision += 1
        for effect in effects:
            if isinstance(effect, (Dispatch, Reject)):
                self._decide(effect, begun_ns)
            elif isinstance(effect, ServedElsewhere):
                self._metrics.served_elsewhere.inc()
                log.debug("served elsewhere", picked=effect.picked, served_by=effect.served_by)
            elif isinstance(effect, LoadModel):
                self._loader.load(effect.endpoint, effect.model, self)
            else:
                self._turned(effect)
        self._note_emptied()
        self._set_timer()

    def _note_emptied(self) -> None:
        if not self._held:
            self._emptied.set()

    def _decide(self, decision: Dispatch | Reject, begun_ns: int) -> None:
        stay = self._held.pop(decision.ticket)
        stay.decide(decision, max(begun_ns, stay.arrived_ns), self._clock.unix_ns())
        self._metrics.decided(decision)
        self.watchers.decided(decision)

    def _turned(self, effect: WorkerTurned) -> None:
        self._metrics.turned.labels(effect.state).inc()
        # A short silence is no news, nor is its end: on a busy machine a hundred workers pause together.
        quiet = effect.state == "stale" or effect.endpoint in self._silent
        (self._silent.add if effect.state == "stale" else self._silent.discard)(effect.endpoint)
        say = log.debug if quiet else log.info
        say("worker turned", worker=effect.endpoint, state=effect.state)

    def _set_timer(self) -> None:
        """Keep one timer, at the scheduler's next wake or earlier."""
        wake = self._scheduler.next_wake()
        if wake is None or self._closed or (self._timer is not None and self._timer_due <= wake):
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(wake - self._clock.monotonic(), TIMER_MIN_S)
        self._timer_due = wake
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._perform(self._scheduler.tick(self._clock.monotonic()), self._clock.unix_ns())
