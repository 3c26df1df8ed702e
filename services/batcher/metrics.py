"""The batcher's Prometheus metrics, `tokenloom_batcher_*`.

Counts are fed as things happen; gauges are read from the scheduler when somebody looks. Labels are
closed sets: outcomes (`dispatched`, `cancelled`, or a reason of `loom.errors.v1`) and worker states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.batcher.core.messages import Usage
from services.batcher.core.scheduler import Scheduler

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
WORKER_STATES = ("alive", "draining", "stale", "lost")

C = TypeVar("C", bound=Collector)


class BatcherMetrics:
    """What is counted as it happens."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._collectors: list[Collector] = []
        self.requests = self._keep(
            Counter(
                "tokenloom_batcher_requests",
                "Requests that left the queue, by outcome: dispatched, cancelled or a refusal's reason",
                ["outcome"],
                registry=registry,
            )
        )
        self.dispatched = self.requests.labels("dispatched")
        self.cancelled = self.requests.labels("cancelled")
        self.queue_seconds = self._keep(
            Histogram(
                "tokenloom_batcher_queue_duration_seconds",
                "From arrival to dispatch",
                buckets=SECONDS,
                registry=registry,
            )
        )
        self._ended = self._keep(
            Counter(
                "tokenloom_batcher_leases_ended", "Leases that ended, whatever the cause", registry=registry
            )
        )
        tokens = self._keep(
            Counter(
                "tokenloom_batcher_served_tokens",
                "Tokens of ended requests, by kind: prompt (not cached), cached_prompt, completion",
                ["kind"],
                registry=registry,
            )
        )
        self._prompt_tokens = tokens.labels("prompt")
        self._cached_tokens = tokens.labels("cached_prompt")
        self._completion_tokens = tokens.labels("completion")
        self.served_elsewhere = self._keep(
            Counter(
                "tokenloom_batcher_served_elsewhere",
                "Requests that another worker served than the one picked",
                registry=registry,
            )
        )
        self.malformed = self._keep(
            Counter(
                "tokenloom_batcher_malformed",
                "Requests without the headers that a queue needs",
                registry=registry,
            )
        )
        self.reports = self._keep(
            Counter("tokenloom_batcher_load_reports", "Load reports taken in", registry=registry)
        )
        self.turned = self._keep(
            Counter(
                "tokenloom_batcher_worker_turns",
                "Workers that became alive, draining, stale or lost",
                ["state"],
                registry=registry,
            )
        )

    def ended(self, usage: Usage | None) -> None:
        """A lease ended."""
        self._ended.inc()
        if usage is not None:
            self._prompt_tokens.inc(usage.prompt_tokens - usage.cached_prompt_tokens)
            self._cached_tokens.inc(usage.cached_prompt_tokens)
            self._completion_tokens.inc(usage.completion_tokens)

    def watch(self, scheduler: Scheduler) -> None:
        """Also show the scheduler's gauges."""
        collector = SchedulerCollector(scheduler)
        self._registry.register(collector)
        self._collectors.append(collector)

    def close(self) -> None:
        """Take everything out of the registry again."""
        for collector in self._collectors:
            self._registry.unregister(collector)
        self._collectors.clear()

    def _keep(self, collector: C) -> C:
        self._collectors.append(collector)
        return collector


class SchedulerCollector(Collector):
    """What is read from the scheduler when somebody looks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Every gauge."""
        scheduler = self._scheduler
        yield _gauge("tokenloom_batcher_queue_size", "Requests in all queues", scheduler.waiting)
        yield _gauge("tokenloom_batcher_leases", "Requests dispatched and not ended", scheduler.leased)
        yield _gauge("tokenloom_batcher_draining", "1 while new requests are refused", scheduler.draining)
        states = scheduler.worker_states()
        workers = GaugeMetricFamily("tokenloom_batcher_workers", "Workers by state", labels=["state"])
        for state in WORKER_STATES:
            workers.add_metric([state], float(states.count(state)))
        yield workers


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
