"""The event loop of one run: requests arrive, a policy decides, workers step and report.

What is told to whom, and when: an arrival reaches the policy at once and a chosen worker LINK_S later;
reports, first tokens and ends of streams reach the policy LINK_S after they left the worker. Events of
one instant happen in the order of their kinds, then in that in which they were caused, so that a run is
the same whenever it is repeated. Bound: a run is cut DRAIN_MAX_S after the last arrival.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from math import inf
from typing import Any

from services.batcher.core.messages import LoadReport, Request, Usage
from services.batcher.simulate.law import Profile
from services.batcher.simulate.policies.base import Decisions, Policy, Refuse
from services.batcher.simulate.record import Record, Sample
from services.batcher.simulate.reports import (
    HEARTBEAT_S,
    MODEL,
    PRIORITY,
    REPORT_INTERVAL_S,
    TENANT,
    Reporter,
)
from services.batcher.simulate.sequence import Happening, Sequence
from services.batcher.simulate.trace import Arrival
from services.batcher.simulate.worker import Worker

LINK_S = 0.001
"""One way between batcher and worker."""
DRAIN_MAX_S = DEADLINE_S = 600.0
"""After it callers give up."""
WAKE_MIN_S = 0.001
"""The batcher's own timer is no finer; so time goes on, whatever a policy asks for."""
SAMPLE_S = 1.0
"""Between two looks at the queues."""
MAX_NEW_TOKENS = 2_000
"""What callers allow; how long answers really are is known to nobody."""
START_UNIX_MS = 1_700_000_000_000

ARRIVE, LAND, STEP, REPORT, DELIVER, FIRST_TOKEN, END, WAKE, SAMPLE = range(9)
"""Kinds of events, in the order in which those of one instant happen."""


class Mesh:
    """One policy, some workers, and the requests of one run."""

    def __init__(
        self, arrivals: Seq[Arrival], policy: Policy, profile: Profile, workers: int, slo_ttft_s: float
    ):
        self._arrivals = arrivals
        self._policy = policy
        self._slo_ttft_ms = round(slo_ttft_s * 1000)
        self._names = [f"r{number}" for number in range(len(arrivals))]
        self.workers = [Worker(profile) for _ in range(workers)]
        self._reporters = [Reporter(worker, index, self._names) for index, worker in enumerate(self.workers)]
        self._reported_at = [0.0] * workers
        self._report_due = [inf] * workers
        self._step_due = [inf] * workers
        self._wake_at = inf
        self._events: list[tuple[float, int, int, int, Any]] = []
        self._caused = 0
        self._open = len(arrivals)
        """Requests that have not ended."""
        self.record = Record(len(arrivals))
        self.now = 0.0

    def run(self) -> Record:
        """Until all requests have ended."""
        for index in range(len(self.workers)):
            self._deliver(index, self._report(index, 0.0), 0.0)
        for number, arrival in enumerate(self._arrivals):
            self._at(arrival.at, ARRIVE, number, None)
        self._at(0.0, SAMPLE, 0, None)
        until = (self._arrivals[-1].at if self._arrivals else 0.0) + DRAIN_MAX_S
        handlers = (
            self._arrive, self._land, self._step, self._report_now, self._deliver,
            self._first_token, self._end, self._wake, self._sample,
        )  # fmt: skip
        events = self._events
        while self._open and events:
            now, kind, _, which, what = heappop(events)
            if now > until:
                break
            self.now = now
            handlers[kind](which, what, now)
        for index, worker in enumerate(self.workers):
            self.record.worker_ended(index, worker)
        return self.record

    def _at(self, time: float, kind: int, which: int, what: Any) -> None:
        self._caused += 1
        heappush(self._events, (time, kind, self._caused, which, what))

    # Requests.

    def _arrive(self, number: int, _: None, now: float) -> None:
        arrival = self._arrivals[number]
        request = Request(
            request_id=self._names[number],
            model=MODEL,
            tenant=TENANT,
            priority=PRIORITY,
            arrival_unix_ms=START_UNIX_MS + int(now * 1000),
            deadline=now + DEADLINE_S,
            prompt_tokens=arrival.prompt_tokens,
            max_new_tokens=MAX_NEW_TOKENS,
            prefix=arrival.prefix,
            deadline_unix_ms=START_UNIX_MS + int((now + DEADLINE_S) * 1000),
            ttft_slo_ms=self._slo_ttft_ms,
        )
        self._perform(self._policy.arrived(number, request, now), now)

    def _perform(self, decisions: Decisions, now: float) -> None:
        for decision in decisions:
            if isinstance(decision, Refuse):
                self.record.refused(decision.number, decision.reason, now)
                self._open -= 1
            else:
                self.record.sent(decision.number, decision.worker, now)
                self._at(now + LINK_S, LAND, decision.number, decision.worker)
        wake = self._policy.next_wake()
        if wake is None:
            return
        at = max(wake, now + WAKE_MIN_S)
        if at < self._wake_at:
            self._wake_at = at
            self._at(at, WAKE, 0, None)

    def _wake(self, _: int, __: None, now: float) -> None:
        if now == self._wake_at:
            self._wake_at = inf
            self._perform(self._policy.wake(now), now)

    def _first_token(self, number: int, _: None, now: float) -> None:
        self._perform(self._policy.first_token(number, now), now)

    def _end(self, number: int, sequence: Sequence, now: float) -> None:
        self._open -= 1
        usage = Usage(sequence.prompt_tokens, sequence.cached, sequence.output_tokens)
        self._perform(self._policy.ended(number, usage, now), now)

    # Workers.

    def _land(self, number: int, index: int, now: float) -> None:
        arrival = self._arrivals[number]
        worker = self.workers[index]
        worker.land(Sequence(number, arrival.prompt_tokens, arrival.output_tokens, arrival.prefix), now)
        self._follow(index, worker)
        self._changed(index, now)

    def _step(self, index: int, _: None, now: float) -> None:
        worker = self.workers[index]
        if now != worker.due or now != self._step_due[index]:
            return
        self._step_due[index] = inf
        for happening, sequence in worker.step_ended():
            number = sequence.number
            if happening is Happening.FIRST_TOKEN:
                self.record.first_token(number, sequence.cached, now)
                self._at(now + LINK_S, FIRST_TOKEN, number, None)
            else:
                self.record.ended(number, sequence.preemptions, now)
                self._at(now + LINK_S, END, number, sequence)
        self._follow(index, worker)
        self._changed(index, now)

    def _follow(self, index: int, worker: Worker) -> None:
        """Its step, or its stretch of steps, ends at a time that may be new."""
        if worker.due != self._step_due[index] and worker.due != inf:
            self._step_due[index] = worker.due
            self._at(worker.due, STEP, index, None)

    # Reports.

    def _changed(self, index: int, now: float) -> None:
        due = max(now, self._reported_at[index] + REPORT_INTERVAL_S)
        if due < self._report_due[index]:
            self._report_due[index] = due
            self._at(due, REPORT, index, None)

    def _report_now(self, index: int, _: None, now: float) -> None:
        if now == self._report_due[index]:
            self._at(now + LINK_S, DELIVER, index, self._report(index, now))

    def _report(self, index: int, now: float) -> LoadReport:
        self._reported_at[index] = now
        self._report_due[index] = inf
        if self._policy.wants_heartbeats:
            self._report_due[index] = now + HEARTBEAT_S
            self._at(now + HEARTBEAT_S, REPORT, index, None)
        return self._reporters[index].report(now)

    def _deliver(self, index: int, report: LoadReport, now: float) -> None:
        self._perform(self._policy.reported(index, report, now), now)

    def _sample(self, _: int, __: None, now: float) -> None:
        queued = sum(len(worker.waiting) for worker in self.workers)
        running = sum(worker.running for worker in self.workers)
        self.record.samples.append(Sample(now, self._policy.waiting, queued, running))
        self._at(now + SAMPLE_S, SAMPLE, 0, None)
