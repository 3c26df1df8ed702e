"""Puts the core to work: gives it events and the time, and performs the effects that it returns.

It decides nothing. Everything runs on one event loop, so the core needs no lock. Bound: refusals are
remembered for `WatchRequest`, at most `REFUSALS_KEPT_MAX`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable

from services.batcher.core.messages import (
    Dispatch,
    Effect,
    LoadReport,
    Reject,
    Request,
    ServedElsewhere,
    Usage,
    WorkerTurned,
)
from services.batcher.core.scheduler import Scheduler
from services.batcher.core.snapshot import Place, Snapshot
from services.batcher.metrics import BatcherMetrics
from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

REFUSALS_KEPT_MAX = 4096
LEASES_SHOWN_MAX = 1000

Decision = Dispatch | Reject
log = get_logger(__name__)


class Stay:
    """One request's stay at this replica, from its arrival to the end of its stream."""

    __slots__ = ("decision", "ticket", "waiter")

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.decision: Decision | None = None
        self.waiter: asyncio.Future[Decision] | None = None


class Driver:
    """One scheduler on one event loop. It is the `FleetListener` of the workers' reports."""

    def __init__(self, scheduler: Scheduler, clock: Clock, metrics: BatcherMetrics) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._tickets = itertools.count(1)
        self._stays: dict[int, Stay] = {}
        self._refused: OrderedDict[str, Reject] = OrderedDict()
        self._idle: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    # Requests, as the ext_proc stream tells of them.

    def arrive(self, request: Request) -> Stay:
        """A request came. Its decision is there at once, or `waiter` will have it."""
        stay = Stay(next(self._tickets))
        self._stays[stay.ticket] = stay
        self._perform(self._scheduler.request_arrived(stay.ticket, request, self._clock.monotonic()))
        if stay.decision is None:
            stay.waiter = asyncio.get_running_loop().create_future()
        return stay

    def hold_limit_s(self, request: Request) -> float:
        """The longest that this request may be held from now on."""
        return self._scheduler.hold_limit_s(request, self._clock.monotonic())

    def response_seen(self, stay: Stay, served_by: str) -> None:
        """Response headers came by."""
        if self._scheduler.holds(stay.ticket):
            self._perform(self._scheduler.response_seen(stay.ticket, served_by, self._clock.monotonic()))

    def ended(self, stay: Stay, usage: Usage | None) -> None:
        """The stream ended, whatever the cause. Safe to call for every stay, once."""
        self._stays.pop(stay.ticket, None)
        if self._scheduler.holds(stay.ticket):
            waiting = stay.decision is None
            self._perform(self._scheduler.stream_ended(stay.ticket, usage, self._clock.monotonic()))
            if waiting:
                self._metrics.cancelled()
            else:
                self._metrics.completed(usage)

    # Workers, as the watch tells of them.

    def found(self, endpoint: str) -> None:
        self._scheduler.worker_found(endpoint)

    def reported(self, endpoint: str, report: LoadReport) -> None:
        self._perform(self._scheduler.load_reported(endpoint, report, self._clock.monotonic()))

    def lost(self, endpoint: str) -> None:
        self._perform(self._scheduler.worker_lost(endpoint, self._clock.monotonic()))

    def removed(self, endpoint: str) -> None:
        self._perform(self._scheduler.worker_removed(endpoint, self._clock.monotonic()))

    # For people.

    def snapshot(self) -> Snapshot:
        """This replica's state now."""
        return self._scheduler.snapshot(self._clock.monotonic(), LEASES_SHOWN_MAX)

    def place_of(self, request_id: str) -> Place | Reject | None:
        """Where a request is, or how it was refused; None when it is not known (any more)."""
        place = self._scheduler.place_of(request_id, self._clock.monotonic())
        return place if place is not None else self._refused.get(request_id)

    @property
    def waiting(self) -> int:
        """Requests in all queues."""
        return self._scheduler.waiting

    # The end.

    def drain(self) -> int:
        """Refuse new requests; how many still wait."""
        self._scheduler.drain()
        return self._scheduler.waiting

    async def drained(self, grace_s: float) -> None:
        """Returns when nothing waits and no lease is open, or after `grace_s`."""
        if self._busy():
            self._idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)

    def close(self) -> None:
        """Refuse what still waits, and stop the clock."""
        self._perform(self._scheduler.close(self._clock.monotonic()))
        if self._timer is not None:
            self._timer.cancel()

    # Inside.

    def _busy(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.leased)

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, (Dispatch, Reject)):
                self._decide(effect)
            elif isinstance(effect, ServedElsewhere):
                self._metrics.served_elsewhere()
                log.info("served elsewhere", picked=effect.picked, served_by=effect.served_by)
            elif isinstance(effect, WorkerTurned):
                log.info("worker turned", worker=effect.endpoint, state=effect.state)
        if self._idle is not None and not self._busy():
            self._idle.set()
        self._arm()

    def _decide(self, decision: Decision) -> None:
        self._metrics.decided(decision)
        if isinstance(decision, Reject):
            self._refused[decision.request.request_id] = decision
            if len(self._refused) > REFUSALS_KEPT_MAX:
                self._refused.popitem(last=False)
        stay = self._stays.get(decision.ticket)
        if stay is None:
            return
        stay.decision = decision
        if stay.waiter is not None and not stay.waiter.done():
            stay.waiter.set_result(decision)

    def _arm(self) -> None:
        """Keep one timer, for the earliest thing that is due."""
        due = self._scheduler.next_wake()
        if due is None or due >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(due - self._clock.monotonic(), 0.0)
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self._perform(self._scheduler.tick(self._clock.monotonic()))
