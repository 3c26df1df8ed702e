"""Ours: the scheduler of the batcher itself, told what its driver would tell it."""

from __future__ import annotations

from collections.abc import Sequence

from services.batcher.core.messages import Dispatch, Effect, Limits, LoadReport, Reject, Request, Usage
from services.batcher.core.scheduler import Scheduler
from services.batcher.simulate.policies.base import Decision, Decisions, Refuse, Send


class Tokenloom:
    """The core, with numbers for tickets and indices for endpoints."""

    wants_heartbeats = True

    def __init__(self, workers: int, limits: Limits) -> None:
        self._scheduler = Scheduler(limits, "sim")
        self._endpoints = [f"worker-{index}:9100" for index in range(workers)]
        self._indices = {endpoint: index for index, endpoint in enumerate(self._endpoints)}
        self._sent_to: dict[int, str] = {}
        for endpoint in self._endpoints:
            self._scheduler.worker_found(endpoint)

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    def arrived(self, number: int, request: Request, now: float) -> Decisions:
        return self._decisions(self._scheduler.request_arrived(number, request, now))

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        return self._decisions(self._scheduler.load_reported(self._endpoints[worker], report, now))

    def first_token(self, number: int, now: float) -> Decisions:
        return self._decisions(self._scheduler.response_seen(number, self._sent_to[number], now))

    def ended(self, number: int, usage: Usage, now: float) -> Decisions:
        del self._sent_to[number]
        return self._decisions(self._scheduler.stream_ended(number, usage, now))

    def next_wake(self) -> float | None:
        return self._scheduler.next_wake()

    def wake(self, now: float) -> Decisions:
        return self._decisions(self._scheduler.tick(now))

    def _decisions(self, effects: Sequence[Effect]) -> Decisions:
        decisions: list[Decision] = []
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._sent_to[effect.ticket] = effect.endpoint
                decisions.append(Send(effect.ticket, self._indices[effect.endpoint]))
            elif isinstance(effect, Reject):
                decisions.append(Refuse(effect.ticket, effect.reason))
        return decisions
