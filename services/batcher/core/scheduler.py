"""The batching queue's decisions: who runs next, where, and who is refused.

One event and the time go in, the effects to perform come out; every event re-plans only the models
that it touched. A request is bound late: it waits here until a worker can start it now. Ordering
inside a model is `queue.py`'s, the bounds `admission.py`'s, the choice of a worker `pool.py`'s, the
wording of a refusal `refusals.py`'s. Bounds: `Limits`; beyond them, leases are bounded by what workers
report free, and one plan passes over at most `ASIDE_MAX` requests.
"""

from __future__ import annotations

from services.batcher.core import admission, gauges, refusals
from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.gauges import Gauges
from services.batcher.core.ledger import Ledger
from services.batcher.core.lifecycle import Happening, State
from services.batcher.core.messages import (
    Effect,
    Limits,
    LoadReport,
    Reject,
    Request,
    ServedElsewhere,
    Usage,
    Verdict,
    WorkerTurned,
)
from services.batcher.core.planner import Planner, Timed
from services.batcher.core.queue import Aging, ModelQueue
from services.batcher.core.residency import Want
from services.batcher.core.snapshot import Place, Snapshot, take
from services.batcher.core.timers import Timers


def _pending(thing: Timed) -> bool:
    if isinstance(thing, Entry):
        return thing.state is State.WAITING
    if isinstance(thing, ModelQueue):
        return thing.watched_until is not None
    if isinstance(thing, Want):
        return thing.timed
    return thing.watched


class Scheduler:
    """All state of one batcher replica. Times given to it never go back."""

    def __init__(self, limits: Limits, lease_prefix: str) -> None:
        """`lease_prefix` makes lease ids unique over replicas and restarts."""
        self._limits = limits
        self._ledger = Ledger(limits.tenants_max, limits.tenant_weights)
        self._fleet = Fleet()
        self._timers: Timers[Timed] = Timers(_pending)
        self._planner = Planner(limits, lease_prefix, self._ledger, self._fleet, self._timers)
        self._draining = False

    # Requests.

    def request_arrived(self, ticket: int, request: Request, now: float) -> list[Effect]:
        """A request wants a worker. Raises ValueError for a ticket that is here already."""
        if ticket in self._ledger.entries:
            raise ValueError(f"ticket {ticket} is in use")
        self._ledger.counters.arrived += 1
        entry = Entry(ticket, request, now)
        effects: list[Effect] = []
        refusal = self._refusal_at_arrival(entry, now, effects)
        if refusal is not None:
            self._ledger.turn_away(entry, refusal.reason)
            effects.append(refusal)
            return effects
        self._ledger.enter(entry)
        self._planner.plan(request.model, now, effects, entry)
        if entry.state is State.WAITING:
            self._timers.at(min(request.deadline, entry.entered + self._limits.hold_max_s), entry)
            self._watch_aging(self._ledger.queues[request.model])
        return effects

    def response_seen(self, ticket: int, served_by: str, now: float) -> list[Effect]:
        """Response headers came by. `served_by` is the endpoint that answered, empty when it did not say."""
        entry = self._ledger.entries[ticket]
        effects: list[Effect] = []
        if entry.state is State.WAITING:
            # The proxy answered by itself: it does not wait any longer.
            self._ledger.leave(entry, Happening.ANSWERED)
            self._planner.plan(entry.request.model, now, effects)
            return effects
        entry.move(Happening.ANSWERED)
        entry.served_by = served_by
        picked = entry.worker.endpoint if entry.worker is not None else ""
        if served_by and served_by != picked:
            self._ledger.counters.served_elsewhere += 1
            effects.append(ServedElsewhere(ticket, picked, served_by))
            self._planner.plan_all(self._fleet.move(entry, served_by, now), now, effects)
        self._fleet.answered(entry, now)
        return effects

    def stream_ended(self, ticket: int, usage: Usage | None, now: float) -> list[Effect]:
        """The request's stream ended, whatever the cause: it leaves the queue, or its lease ends."""
        entry = self._ledger.entries[ticket]
        effects: list[Effect] = []
        if entry.state is State.WAITING:
            self._ledger.leave(entry, Happening.CLOSED)
            self._planner.plan(entry.request.model, now, effects)
        else:
            self._fleet.settle(entry, usage)
            self._fleet.decoded(entry, now)
            touched = self._fleet.release(entry, now)
            self._ledger.end(entry, usage)
            self._planner.plan_all(touched, now, effects)
            self._planner.tidy(entry.request.model)
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
        for charge in self._fleet.news(worker, report.news) if report.news else ():
            if (queue := self._ledger.queues.get(charge.model)) is not None:
                queue.charge(charge.band, charge.tenant, charge.prompt_tokens, charge.generated_tokens)
        if not worker.watched:
            worker.watched = True
            self._timers.at(now + self._limits.report_stale_s, worker)
        effects: list[Effect] = []
        if worker.state != before:
            effects.append(WorkerTurned(endpoint, worker.state))
        self._planner.plan_all(touched, now, effects)
        return effects

    def worker_lost(self, endpoint: str, now: float) -> list[Effect]:
        """The stream of load reports broke."""
        worker = self._fleet.workers.get(endpoint)
        if worker is None or not worker.connected:
            return []
        touched = self._fleet.lost(worker, now)
        effects: list[Effect] = [WorkerTurned(endpoint, worker.state)]
        self._planner.plan_all(touched, now, effects)
        return effects

    def worker_removed(self, endpoint: str, now: float) -> list[Effect]:
        """A worker is not discovered any more."""
        effects = self.worker_lost(endpoint, now)
        self._fleet.forget(endpoint)
        return effects

    def load_ended(self, endpoint: str, model: str, verdict: Verdict | None, now: float) -> list[Effect]:
        """A worker that was asked to load a model has it, or says why not. Any other answer is ignored."""
        effects: list[Effect] = []
        want = self._planner.residency.ended(endpoint, model, verdict, now)
        if want is not None:
            self._planner.plan(model, now, effects)
            self._planner.look_again(want, now)
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
            elif isinstance(thing, ModelQueue):
                self._planner.check_unserved(thing, now, effects)
            elif isinstance(thing, Want):
                self._look_for_worker(thing, now, effects)
            else:
                self._promote(thing, now, effects)
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
            self._planner.refuse(entry, refusals.draining(entry, now), effects)
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
        want = self._planner.residency.wants.get(request.model)
        endpoint = ""
        progress: float | None = None
        if coming is not None:
            endpoint, progress = coming.worker.endpoint, coming.report.progress
        elif want is not None and want.endpoint:
            endpoint, progress = want.endpoint, 0.0
        return Place(entry.ticket, position, now - entry.entered, request.priority, endpoint, progress)

    def snapshot(self, now: float, leases_max: int) -> Snapshot:
        """Everything, for people: walks all queues' heads, all workers, and at most `leases_max` leases."""
        return take(now, self._ledger, self._fleet, leases_max=leases_max, draining=self._draining)

    def gauges(self, now: float) -> Gauges:
        """What meters show: much less than `snapshot`."""
        return gauges.read(now, self._ledger, self._fleet)

    # Inside.

    def _refusal_at_arrival(self, entry: Entry, now: float, effects: list[Effect]) -> Reject | None:
        """Why a request may not wait. Less urgent ones may be dropped for it, which is told in `effects`."""
        request, limits, ledger = entry.request, self._limits, self._ledger
        if self._draining:
            return refusals.draining(entry, now)
        if request.deadline <= now:
            return refusals.deadline(entry, now)
        queue = ledger.queues.get(request.model)
        if not queue and len(ledger.queues) >= limits.queues_max and ledger.waited_for() >= limits.queues_max:
            return refusals.queues_full(entry, now, limits.queues_max)
        estimate_s = admission.estimate_s(queue, self._fleet.pools.get(request.model), entry, now)
        if now + estimate_s >= request.deadline:
            return refusals.unreachable(entry, now, estimate_s)
        if queue is None:
            return None
        while (bound := admission.full(limits, queue, entry.band, request)) is not None:
            victim = queue.least_urgent(entry.band) if bound.scope == "queue" else None
            if victim is None or not admission.shedding_helps(limits, queue, entry.band, request):
                return refusals.queue_full(entry, now, bound, queue.drain_estimate_s())
            self._planner.refuse(victim, refusals.shed(victim, now, queue.drain_estimate_s()), effects)
        return None

    def _expire(self, entry: Entry, now: float, effects: list[Effect]) -> None:
        model = entry.request.model
        if entry.request.deadline <= now:
            self._planner.refuse(entry, refusals.deadline(entry, now), effects)
        elif entry.entered + self._limits.hold_max_s <= now:
            drain_s = self._ledger.queues[model].drain_estimate_s()
            self._planner.refuse(entry, refusals.queue_timeout(entry, now, drain_s), effects)
        # Otherwise it waits for a busy worker, and is looked at again.
        self._planner.plan(model, now, effects)

    def _check_silence(self, worker: Worker, now: float, effects: list[Effect]) -> None:
        silent_until = worker.reported_at + self._limits.report_stale_s
        worker.watched = worker.alive and silent_until > now
        if worker.watched:
            self._timers.at(silent_until, worker)
        elif worker.alive:
            self._planner.turn_stale(worker, now, effects)
            # Those who waited for it because it holds their prefix may go elsewhere.
            self._planner.plan_all(list(worker.loads), now, effects)

    def _look_for_worker(self, want: Want, now: float, effects: list[Effect]) -> None:
        want.timed = False
        self._planner.plan(want.model, now, effects)
        if not self._ledger.queues.get(want.model):
            self._planner.residency.rest(want.model, now)
        if self._planner.residency.wants.get(want.model) is want:
            self._planner.look_again(want, now)

    def _watch_aging(self, queue: ModelQueue) -> None:
        """A timer moves up those who wait for long in a low band."""
        due = queue.promotion_due(self._limits.age_promote_s)
        queue.aging.watched = queue.aging.watched or due is not None
        if due is not None and not queue.aging.timed:
            queue.aging.timed = True
            self._timers.at(due, queue.aging)

    def _promote(self, aging: Aging, now: float, effects: list[Effect]) -> None:
        aging.watched = aging.timed = False
        moved = aging.queue.promote(self._limits.age_promote_s, now)
        self._ledger.counters.promoted += moved
        self._watch_aging(aging.queue)
        if moved:
            # Another one is first now, and may fit where the one before did not.
            self._planner.plan(aging.queue.model, now, effects)
