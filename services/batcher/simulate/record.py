"""What happened in one run, as it happened: times of each request, state of the queues, ends of workers."""

from __future__ import annotations

from typing import NamedTuple

from services.batcher.simulate.worker import Worker


class Sample(NamedTuple):
    """The queues at one time."""

    at: float
    held: int
    """Requests that the policy holds back."""
    queued: int
    """Requests that wait on workers."""
    running: int


class WorkerTotals(NamedTuple):
    """One worker at the end."""

    busy_s: float
    prompt_tokens: int
    hit_tokens: int
    computed_prompt_tokens: int
    generated_tokens: int


class Record:
    """By request number; a time of -1 means never."""

    def __init__(self, requests: int) -> None:
        self.sent_at = [-1.0] * requests
        self.sent_to = [-1] * requests
        self.first_token_at = [-1.0] * requests
        self.ended_at = [-1.0] * requests
        self.cached = [0] * requests
        self.refusals: dict[int, str] = {}
        self.samples: list[Sample] = []
        self.workers: dict[int, WorkerTotals] = {}
        self.preemptions = 0

    def sent(self, number: int, worker: int, now: float) -> None:
        """Raises ValueError for a request that was decided before."""
        self._undecided(number)
        self.sent_at[number] = now
        self.sent_to[number] = worker

    def refused(self, number: int, reason: str, now: float) -> None:
        """Raises ValueError for a request that was decided before."""
        self._undecided(number)
        self.refusals[number] = reason

    def first_token(self, number: int, cached: int, now: float) -> None:
        self.first_token_at[number] = now
        self.cached[number] = cached

    def ended(self, number: int, preemptions: int, now: float) -> None:
        self.ended_at[number] = now
        self.preemptions += preemptions

    def worker_ended(self, index: int, worker: Worker) -> None:
        self.workers[index] = WorkerTotals(
            worker.busy_s,
            worker.prompt_tokens,
            worker.hit_tokens,
            worker.computed_prompt_tokens,
            worker.generated_tokens,
        )

    def _undecided(self, number: int) -> None:
        if self.sent_to[number] >= 0 or number in self.refusals:
            raise ValueError(f"request {number} was decided before")
