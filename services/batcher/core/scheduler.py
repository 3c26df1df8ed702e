"""The batching queue's decisions: who runs next, where, and who is refused.

One event and the time go in, the effects to perform come out; every event re-plans only the models
that it touched. A request is bound late: it waits here until a worker can start it now. Ordering
inside a model is `queue.py`'s, the choice of a worker `pool.py`'s, the wording of a refusal
`refusals.py`'s. Bounds: `Limits`; beyond them, leases are bounded by what workers report free.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.batcher.core import refusals
from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.ledger import Ledger
from services.batcher.core.lifecycle import Happening, State
from services.batcher.core.messages import (
    Dispatch,
    Effect,
    Limits,
    LoadReport,
    Reject,
    Request,
    ServedElsewhere,
    Usage,
    WorkerTurned,
)
from services.batcher.core.pool import Load
from services.batcher.core.queue import ModelQueue
from services.batcher.core.snapshot import Place, Snapshot, take
from services.batcher.core.timers import Timers

Timed = Entry | Worker | ModelQueue


def _pending(thing: Timed) -> bool:
    if isinstance(thing, Entry):
        return thing.state is State.WAITING
    return thing.watched


class Scheduler:
    """All state of one batcher replica. Times given to it never go back."""

    def __init__(self, limits: Limits, lease_prefix: str) -> None:
        """`lease_prefix` makes lease ids unique over replicas and restarts."""
        self._limits = limits
        self._lease_prefix = lease_prefix
        self._lease_count = 0
        self._ledger = Ledger(limits.tenants_max)
        self._fleet = Fleet()
        self._timers: Timers[Timed] = Timers(_pending)
        self._draining = False

    # Requests.

    def request_arrived(self, ticket: int, request: Request, now: float) -> list[Effect]:
        """A request wants a worker. Raises ValueError for a ticket that is here already."""
        if ticket in self._ledger.entries:
            raise ValueError(f"ticket {ticket} is in use")
        self._ledger.counters.arrived += 1
        entry = Entry(ticket, request, now)
        refusal = self._refusal_at_arrival(entry, now)
        if refusal is not None:
            self._ledger.turn_away(entry, refusal.reason)
            return [refusal]
        self._ledger.enter(entry)
        effects: list[Effect] = []
        self._plan(request.model, now, effects)
        if entry.state is State.WAITING:
            self._timers.at(min(request.deadline, entry.entered + self._limits.hold_max_s), entry)
        return effects

    def response_seen(self, ticket: int, served_by: str, now: float) -> list[Effect]:
        """Response headers came by. `served_by` is the endpoint that answered, empty when it did not say."""
        entry = self._ledger.entries[ticket]
        effects: list[Effect] = []
        if entry.state is State.WAITING:
            # The proxy answered by itself: it does not wait any longer.
            self._ledger.leave(entry, Happening.ANSWERED)
            self._plan(entry.request.model, now, effects)
            return effects
        entry.move(Happening.ANSWERED)
        entry.served_by = served_by
        picked = entry.worker.endpoint if entry.worker is not None else ""
        if served_by and served_by != picked:
            self._ledger.counters.served_elsewhere += 1
            effects.append(ServedElsewhere(ticket, picked, served_by))
            self._plan_all(self._fleet.move(entry, served_by, now), now, effects)
        return effects

    def stream_ended(self, ticket: int, usage: Usage | None, now: float) -> list[Effect]:
        """The request's stream ended, whatever the cause: it leaves the queue, or its lease ends."""
        entry = self._ledger.entries[ticket]
        effects: list[Effect] = []
        if entry.state is State.WAITING:
            self._ledger.leave(entry, Happening.CLOSED)
            self._plan(entry.request.model, now, effects)
        else:
            self._ledger.end(entry, usage)
            self._plan_all(self._fleet.release(entry, now), now, effects)
        return effects

    def holds(self, ticket: int) -> bool:
        """Whether the request waits or holds a lease."""
        return ticket in self._ledger.entries

    # Workers.

    def worker_found(self, endpoint: str) -> None:
        """A worker was discovered. It counts as lost until it reports."""
        self._fleet.found(endpoint)

    def load_reported(self, endpoint: str, report: LoadReport, now: float) -> list[Effect]:
        """A worker says what it can take. A report of one that was removed is ignored."""
        worker = self._fleet.workers.get(endpoint)
        if worker is None:
            return []
        before = worker.state
        touched = self._fleet.reported(worker, report, now)
        if not worker.watched:
            worker.watched = True
            self._timers.at(now + self._limits.report_stale_s, worker)
        effects: list[Effect] = []
        if worker.state != before:
            effects.append(WorkerTurned(endpoint, worker.state))
        self._plan_all(touched, now, effects)
        return effects

    def worker_lost(self, endpoint: str, now: float) -> list[Effect]:
        """The stream of load reports broke."""
        worker = self._fleet.workers.get(endpoint)
        if worker is None or not worker.connected:
            return []
        touched = self._fleet.lost(worker, now)
        effects: list[Effect] = [WorkerTurned(endpoint, worker.state)]
        self._plan_all(touched, now, effects)
        return effects

    def worker_removed(self, endpoint: str, now: float) -> list[Effect]:
        """A worker is not discovered any more."""
        effects = self.worker_lost(endpoint, now)
        self._fleet.forget(endpoint)
        return effects

    # Time and the end.

    def tick(self, now: float) -> list[Effect]:
        """Do what time made due. Call it at `next_wake()` or later."""
        effects: list[Effect] = []
        for thing in self._timers.due(now):
            if isinstance(thing, Entry):
                self._expire(thing, now, effects)
            elif isinstance(thing, Worker):
                self._check_silence(thing, now, effects)
            else:
                self._check_hopeless(thing, now, effects)
        return effects

    def next_wake(self) -> float | None:
        """When to call `tick` next; None: not before the next event."""
        return self._timers.next()

    def drain(self) -> None:
        """Refuse new requests from now on; those that wait are still placed."""
        self._draining = True

    def close(self, now: float) -> list[Effect]:
        """Refuse what still waits: the process ends."""
        self._draining = True
        effects: list[Effect] = []
        for entry in self._ledger.waiting():
            self._refuse(entry, refusals.draining(entry, now), effects)
        return effects

    # What others may know.

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        """Requests in all queues."""
        return len(self._ledger.entries) - len(self._ledger.leased)

    @property
    def leased(self) -> int:
        """Requests that were placed and have not ended."""
        return len(self._ledger.leased)

    def worker_states(self) -> list[str]:
        """One of lost, stale, draining, alive for each worker."""
        return [worker.state for worker in self._fleet.workers.values()]

    def hold_limit_s(self, request: Request, now: float) -> float:
        """The longest that this request may be held from now on."""
        return max(min(request.deadline - now, self._limits.hold_max_s), 0.0)

    def place_of(self, request_id: str, now: float) -> Place | None:
        """Where the newest request of this id is; None when it is not here (any more)."""
        entry = self._ledger.newest.get(request_id)
        if entry is None:
            return None
        request = entry.request
        if entry.state is not State.WAITING:
            endpoint = entry.served_by or (entry.worker.endpoint if entry.worker is not None else "")
            return Place(entry.ticket, None, entry.leased_at - entry.entered, request.priority, endpoint)
        position = self._ledger.queues[request.model].position(entry)
        pool = self._fleet.pools.get(request.model)
        coming = pool.coming() if pool is not None else None
        endpoint, progress = (coming.worker.endpoint, coming.report.progress) if coming else ("", None)
        return Place(entry.ticket, position, now - entry.entered, request.priority, endpoint, progress)

    def snapshot(self, now: float, leases_max: int) -> Snapshot:
        """Everything, for people: walks all queues' heads, all workers, and at most `leases_max` leases."""
        return take(now, self._ledger, self._fleet, leases_max=leases_max, draining=self._draining)

    # Inside.

    def _refusal_at_arrival(self, entry: Entry, now: float) -> Reject | None:
        request, limits = entry.request, self._limits
        if self._draining:
            return refusals.draining(entry, now)
        if request.deadline <= now:
            return refusals.deadline(entry, now)
        queue = self._ledger.queues.get(request.model)
        if queue is None:
            if len(self._ledger.queues) >= limits.queues_max:
                return refusals.queue_full(entry, now, "models waited for", limits.queues_max, 0.0)
            return None
        full = refusals.full_reason(limits, len(queue), queue.prompt_tokens, request.prompt_tokens)
        if full is not None:
            return refusals.queue_full(entry, now, full[0], full[1], queue.drain_estimate_s())
        return None

    def _plan_all(self, models: Iterable[str], now: float, effects: list[Effect]) -> None:
        for model in models:
            self._plan(model, now, effects)

    def _plan(self, model: str, now: float, effects: list[Effect]) -> None:
        """Place all that can be placed, refuse what never can, and watch over what has no hope."""
        queue = self._ledger.queues.get(model)
        if queue is None:
            self._fleet.forget_pool(model)
            return
        pool = self._fleet.pool(model, now)
        while (entry := queue.head()) is not None:
            request = entry.request
            if request.deadline <= now:
                self._refuse(entry, refusals.deadline(entry, now), effects)
            elif 0 < pool.largest_tokens < request.prompt_tokens:
                self._refuse(entry, refusals.too_large(entry, now, pool.largest_tokens), effects)
            elif (load := pool.choose(request.prompt_tokens)) is None:
                break
            elif load.worker.reported_at + self._limits.report_stale_s <= now:
                self._turn_stale(load.worker, now, effects)
            else:
                self._place(entry, load, now, effects)
        if self._ledger.tidy(queue):
            self._fleet.forget_pool(model)
        else:
            self._watch_over(queue, now)

    def _place(self, entry: Entry, load: Load, now: float, effects: list[Effect]) -> None:
        self._lease_count += 1
        self._ledger.place(entry, f"{self._lease_prefix}-{self._lease_count:x}", now)
        self._fleet.lease(entry, load, now)
        endpoint, waited_s = load.worker.endpoint, now - entry.entered
        effects.append(Dispatch(entry.ticket, entry.request, endpoint, entry.lease_id, waited_s))

    def _refuse(self, entry: Entry, refusal: Reject, effects: list[Effect]) -> None:
        """End a waiting request. The caller plans its model again."""
        self._ledger.refuse(entry, refusal.reason)
        effects.append(refusal)

    def _expire(self, entry: Entry, now: float, effects: list[Effect]) -> None:
        model = entry.request.model
        if entry.request.deadline <= now:
            refusal = refusals.deadline(entry, now)
        else:
            refusal = refusals.queue_timeout(entry, now, self._ledger.queues[model].drain_estimate_s())
        self._refuse(entry, refusal, effects)
        self._plan(model, now, effects)

    def _check_silence(self, worker: Worker, now: float, effects: list[Effect]) -> None:
        silent_until = worker.reported_at + self._limits.report_stale_s
        worker.watched = worker.alive and silent_until > now
        if worker.watched:
            self._timers.at(silent_until, worker)
        elif worker.alive:
            self._turn_stale(worker, now, effects)

    def _turn_stale(self, worker: Worker, now: float, effects: list[Effect]) -> None:
        for model in self._fleet.went_stale(worker, now):
            if (queue := self._ledger.queues.get(model)) is not None:
                self._watch_over(queue, now)
        effects.append(WorkerTurned(worker.endpoint, worker.state))

    def _watch_over(self, queue: ModelQueue, now: float) -> None:
        """While no worker serves or loads a model, a timer refuses those who waited long enough for one."""
        if queue and not queue.watched and not self._fleet.pool(queue.model, now).hopeful:
            queue.watched = True
            self._timers.at(now + self._limits.no_worker_hold_s, queue)

    def _check_hopeless(self, queue: ModelQueue, now: float, effects: list[Effect]) -> None:
        queue.watched = False
        pool, hold_s = self._fleet.pool(queue.model, now), self._limits.no_worker_hold_s
        if pool.hopeful:
            return
        if pool.hopeless_since + hold_s <= now:
            for entry in queue.held_for(hold_s, now):
                self._refuse(entry, refusals.no_capacity(entry, now, pool), effects)
        oldest = queue.oldest()
        if oldest is not None:
            queue.watched = True
            self._timers.at(max(oldest.entered, pool.hopeless_since) + hold_s, queue)
        elif self._ledger.tidy(queue):
            self._fleet.forget_pool(queue.model)
