"""The batcher's Prometheus metrics. Every label comes from a closed set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from services.batcher.core.messages import Dispatch, Reject, Usage

WORKER_STATES = ("alive", "stale", "lost", "draining")
WAIT_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1200, 3600)


class State(Protocol):
    """What the gauges read when they are scraped."""

    @property
    def waiting(self) -> int: ...

    @property
    def leased(self) -> int: ...

    def worker_states(self) -> list[str]: ...


class BatcherMetrics:
    """Counts what the driver performs."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        outcomes = "Requests by outcome: dispatched, cancelled, or the reason of their refusal."
        self._requests = Counter("tokenloom_batcher_requests", outcomes, ["outcome"], registry=registry)
        self._wait = Histogram(
            "tokenloom_batcher_queue_duration_seconds",
            "Time in the queue of requests that were dispatched.",
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self._completed = Counter(
            "tokenloom_batcher_leases_ended", "Leases that ended, whatever the cause.", registry=registry
        )
        self._tokens = Counter(
            "tokenloom_batcher_served_tokens", "Tokens of ended requests.", ["kind"], registry=registry
        )
        self._elsewhere = Counter(
            "tokenloom_batcher_served_elsewhere",
            "Requests that another worker answered than the one picked.",
            registry=registry,
        )

    def decided(self, decision: Dispatch | Reject) -> None:
        """A request left the queue."""
        if isinstance(decision, Dispatch):
            self._requests.labels("dispatched").inc()
            self._wait.observe(decision.waited_s)
        else:
            self._requests.labels(decision.reason.lower()).inc()

    def cancelled(self) -> None:
        """A request left while it waited."""
        self._requests.labels("cancelled").inc()

    def completed(self, usage: Usage | None) -> None:
        """A lease ended."""
        self._completed.inc()
        if usage is not None:
            self._tokens.labels("prompt").inc(usage.prompt_tokens - usage.cached_prompt_tokens)
            self._tokens.labels("cached_prompt").inc(usage.cached_prompt_tokens)
            self._tokens.labels("completion").inc(usage.completion_tokens)

    def served_elsewhere(self) -> None:
        """Envoy moved a request."""
        self._elsewhere.inc()


class StateCollector:
    """Gauges that are read from the scheduler when somebody asks."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """One sample each."""
        waiting = "Requests in all queues."
        yield GaugeMetricFamily("tokenloom_batcher_queue_size", waiting, value=self._state.waiting)
        leases = "Requests that were dispatched and have not ended."
        yield GaugeMetricFamily("tokenloom_batcher_leases", leases, value=self._state.leased)
        workers = GaugeMetricFamily("tokenloom_batcher_workers", "Workers by state.", labels=["state"])
        states = self._state.worker_states()
        for state in WORKER_STATES:
            workers.add_metric([state], states.count(state))
        yield workers
