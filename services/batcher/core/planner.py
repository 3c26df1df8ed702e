"""Who of those waiting is placed where, now: one pass over a model's queue in order.

A request is bound late: it waits until a worker is open for it. One that is better off on a busy worker is
passed over for a while, and keeps its place. It decides nothing about bounds at arrival, and knows
no events: the scheduler calls it when something changed. Bound: one pass passes over at most `ASIDE_MAX`
requests, and over whole tenants whose requests are all late.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.batcher.core import refusals
from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.ledger import Ledger
from services.batcher.core.load import Load
from services.batcher.core.messages import Dispatch, Effect, Limits, Reject, WorkerTurned
from services.batcher.core.pool import Choice, Pool
from services.batcher.core.queue import Aging, ModelQueue
from services.batcher.core.residency import LOOK_S, Residency, Want
from services.batcher.core.timers import Timers

ASIDE_MAX = 16
"""Requests that wait for a busy worker while those behind them are placed."""
LOOK_AGAIN_S = 1.0
"""A request waits no longer than this for a busy worker without another look at where it is best off."""

Timed = Entry | Worker | ModelQueue | Aging | Want


class Planner:
    """Works on the scheduler's own ledger, fleet and timers."""

    def __init__(
        self, limits: Limits, lease_prefix: str, ledger: Ledger, fleet: Fleet, timers: Timers[Timed]
    ) -> None:
        self._limits = limits
        self._lease_prefix = lease_prefix
        self._lease_count = 0
        self._ledger = ledger
        self._fleet = fleet
        self._timers = timers
        self.residency = Residency(fleet, limits.queues_max)

    def plan_all(self, models: Iterable[str], now: float, effects: list[Effect]) -> None:
        """Plan those in which a worker became open; the others stay as they were planned."""
        for model in models:
            pool = self._fleet.pools.get(model)
            if pool is None or pool.opened or not pool.open:
                self.plan(model, now, effects)

    def plan(self, model: str, now: float, effects: list[Effect], new: Entry | None = None) -> None:
        """Place all that can be placed, refuse what never can, and watch over what has no hope. `new` is all
        that changed, if it is given: those behind it need no other look.
        """
        queue = self._ledger.queues.get(model)
        if queue is None or not queue:
            self.tidy(model)
            return
        pool = self._fleet.pool(model, now)
        if pool.opened:
            new = None
        aside = 0
        while pool.open and (entry := queue.head()) is not None:
            request = entry.request
            if request.deadline <= now:
                self.refuse(entry, refusals.deadline(entry, now), effects)
            elif 0 < pool.largest_tokens < request.prompt_tokens:
                self.refuse(entry, refusals.too_large(entry, now, pool.largest_tokens), effects)
            elif not entry.late and entry.late_at <= now + pool.prefill_s(request):
                queue.turn_late(entry)
            elif aside >= ASIDE_MAX and entry.late:
                # Of its tenant only others that are late come after it.
                queue.park(entry)
            else:
                choice = self._choice(pool, entry, aside, now, known=new is not None and entry is not new)
                if choice.waits:
                    self._set_aside(queue, entry, choice, now)
                    aside += 1
                elif choice.load is None:
                    break
                elif choice.load.worker.reported_at + self._limits.report_stale_s <= now:
                    self.turn_stale(choice.load.worker, now, effects)
                    continue
                else:
                    self._place(entry, choice, choice.load, now, effects)
                if entry is new:
                    break
        queue.restore()
        pool.planned()
        if not self.tidy(model):
            self._refuse_at_head(queue, pool, now, effects)
            self.see_to_it(queue, pool, now, effects)
            if not self.tidy(model):
                self.watch_over(queue, now)

    def _choice(self, pool: Pool, entry: Entry, aside: int, now: float, *, known: bool) -> Choice:
        """`known`: nothing changed for it since it was looked at before."""
        if known and entry.awaits is not None and entry.look_at > now and aside < ASIDE_MAX:
            return pool.await_(entry.awaits, entry.request.prompt_tokens)
        entry.awaits = None
        hold_s = self._limits.late_hold_s if entry.late else self._limits.affinity_hold_s
        patience_s = entry.entered + hold_s - now if aside < ASIDE_MAX else 0.0
        return pool.choose(entry.request, patience_s=patience_s, late=entry.late)

    def _set_aside(self, queue: ModelQueue, entry: Entry, choice: Choice, now: float) -> None:
        queue.set_aside(entry)
        entry.awaits = choice
        if entry.look_at <= now:
            hold_s = self._limits.late_hold_s if entry.late else self._limits.affinity_hold_s
            entry.look_at = min(entry.entered + hold_s, now + LOOK_AGAIN_S)
            self._timers.at(entry.look_at, entry)

    def _refuse_at_head(self, queue: ModelQueue, pool: Pool, now: float, effects: list[Effect]) -> None:
        """While no worker is open, at least the head is not kept waiting in vain."""
        while not pool.open and (entry := queue.head()) is not None:
            if entry.request.deadline <= now:
                self.refuse(entry, refusals.deadline(entry, now), effects)
            elif 0 < pool.largest_tokens < entry.request.prompt_tokens:
                self.refuse(entry, refusals.too_large(entry, now, pool.largest_tokens), effects)
            else:
                break

    def tidy(self, model: str) -> bool:
        """Forget a queue in which nobody waits; whether nobody does."""
        queue = self._ledger.queues.get(model)
        if queue is None or self._ledger.tidy(queue):
            self._fleet.forget_pool(model)
            return True
        return False

    def _place(self, entry: Entry, choice: Choice, load: Load, now: float, effects: list[Effect]) -> None:
        self._lease_count += 1
        self._fleet.lease(entry, load, choice.matched, now)
        self._ledger.place(entry, f"{self._lease_prefix}-{self._lease_count:x}", now)
        endpoint, waited_s = load.worker.endpoint, now - entry.entered
        effects.append(Dispatch(entry.ticket, entry.request, endpoint, entry.lease_id, waited_s))

    def refuse(self, entry: Entry, refusal: Reject, effects: list[Effect]) -> None:
        """End a waiting request. The caller plans its model again."""
        self._ledger.refuse(entry, refusal.reason)
        effects.append(refusal)

    def turn_stale(self, worker: Worker, now: float, effects: list[Effect]) -> None:
        """Nothing was heard of a worker for too long: it is not chosen until it reports."""
        for model in self._fleet.went_stale(worker, now):
            if (queue := self._ledger.queues.get(model)) is not None:
                self.watch_over(queue, now)
        effects.append(WorkerTurned(worker.endpoint, worker.state))

    # Models that nobody has.

    def see_to_it(self, queue: ModelQueue, pool: Pool, now: float, effects: list[Effect]) -> None:
        """While somebody waits and nobody has the model or is loading it, find a worker that loads it."""
        if pool.hopeful or not queue:
            self.residency.rest(queue.model, now)
            return
        oldest = queue.oldest()
        assert oldest is not None, "somebody waits"
        want = self.residency.want(queue.model, oldest.request.model_bytes, now)
        if not want.endpoint and now >= want.looked_at + LOOK_S:
            asked = self.residency.seek(want, self._waited_for(), now)
            if asked is not None:
                effects.append(asked)
        if want.refusal is not None:
            for entry in list(queue.by_ticket.values()):
                self.refuse(entry, refusals.not_loadable(entry, now, want.refusal), effects)
        self.look_again(want, now)

    def look_again(self, want: Want, now: float) -> None:
        """A timer looks for a worker again, as long as the model is wanted."""
        if not want.timed:
            want.timed = True
            self._timers.at(now + LOOK_S, want)

    def _waited_for(self) -> list[str]:
        return [queue.model for queue in self._ledger.queues.values() if queue]

    def _hold(self, pool: Pool) -> tuple[float, float]:
        """(since when nobody serves the model, how long that is waited for)."""
        want = self.residency.wants.get(pool.model)
        if pool.hopeful:
            return pool.unready_since, self._limits.loading_hold_s
        if want is None:
            return pool.hopeless_since, self._limits.no_worker_hold_s
        if want.plausible:
            return want.since, self._limits.loading_hold_s
        return max(pool.hopeless_since, want.hopeful_at), self._limits.no_worker_hold_s

    def watch_over(self, queue: ModelQueue, now: float) -> None:
        """While no worker serves a model, a timer refuses those who waited long enough for one."""
        pool = self._fleet.pool(queue.model, now)
        oldest = queue.oldest()
        if oldest is None or pool.ready:
            return
        since, hold_s = self._hold(pool)
        until = max(oldest.entered, since) + hold_s
        if queue.watched_until is None or until < queue.watched_until:
            queue.watched_until = until
            self._timers.at(until, queue)

    def check_unserved(self, queue: ModelQueue, now: float, effects: list[Effect]) -> None:
        """Its timer came up: refuse those who waited long enough for a worker that serves the model."""
        queue.watched_until = None
        pool = self._fleet.pool(queue.model, now)
        if pool.ready:
            return
        since, hold_s = self._hold(pool)
        if since + hold_s <= now:
            want = self.residency.wants.get(queue.model)
            for entry in queue.held_for(hold_s, now):
                if pool.hopeful or (want is not None and want.plausible):
                    self.refuse(entry, refusals.not_ready(entry, now, pool, want), effects)
                else:
                    self.refuse(entry, refusals.no_capacity(entry, now, pool), effects)
        if not self.tidy(queue.model):
            self.watch_over(queue, now)
