"""The batcher's Prometheus metrics, `tokenloom_batcher_*`; docs/reference/batcher-metrics.md lists them.

What happens for every request is counted in plain numbers, a tenth of a `Counter`'s cost, and shown
with the scheduler's gauges when somebody looks. Labels are closed sets: bands, outcomes, reasons of
`loom.errors.v1`, worker states, and tenants: those with a weight of their own, at most `TENANTS_MAX`,
and `other` for all the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.batcher.core.entry import band_of
from services.batcher.core.gauges import Gauges
from services.batcher.core.messages import Dispatch, Reject, Request, Usage
from services.batcher.core.refusals import BANDS
from services.batcher.core.scheduler import Scheduler
from tokenloom.kit.clock import Clock

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
WORKER_STATES = ("alive", "draining", "stale", "lost")
TENANTS_MAX = 100
OTHER = "other"
PREFIX = "tokenloom_batcher_"

C = TypeVar("C", bound=Collector)


class BandTally:
    """How the requests of one band left the queue. Only the event loop's thread may count."""

    __slots__ = ("cancelled", "dispatched", "evicted", "refused", "wait_counts", "wait_sum_s")

    def __init__(self) -> None:
        self.dispatched = 0
        self.cancelled = 0
        self.refused: dict[str, int] = {}
        """By reason, at arrival."""
        self.evicted: dict[str, int] = {}
        """By reason, after a wait."""
        self.wait_counts = [0] * (len(SECONDS) + 1)
        """Dispatches by bucket of their wait; the last one takes what is above all bounds."""
        self.wait_sum_s = 0.0

    def dispatch(self, waited_s: float) -> None:
        """One went to a worker."""
        self.dispatched += 1
        self.wait_counts[bisect_left(SECONDS, waited_s)] += 1
        self.wait_sum_s += waited_s

    def refuse(self, reason: str, waited_s: float) -> None:
        """One was turned away: at once, or after a wait."""
        tally = self.evicted if waited_s > 0 else self.refused
        tally[reason] = tally.get(reason, 0) + 1

    def outcomes(self) -> Iterator[tuple[str, str, int]]:
        """(outcome, reason, count)."""
        yield "dispatched", "", self.dispatched
        yield "cancelled", "", self.cancelled
        yield from (("refused", reason, count) for reason, count in self.refused.items())
        yield from (("evicted", reason, count) for reason, count in self.evicted.items())


class BatcherMetrics:
    """What is counted as it happens."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, tenants: Iterable[str] = ()) -> None:
        """`tenants`: those with a label of their own."""
        self._registry = registry
        self._collectors: list[Collector] = []
        self.bands = tuple(BandTally() for _ in BANDS)
        self.leases_ended = 0
        self.served: dict[str, list[int]] = {name: [0, 0, 0] for name in islice(tenants, TENANTS_MAX)}
        """By tenant: prompt tokens not cached, cached ones, generated ones, of ended requests."""
        self._others = self.served.setdefault(OTHER, [0, 0, 0])
        self.served_elsewhere = self._counter(
            "served_elsewhere", "Requests that another worker served than the one picked"
        )
        self.malformed = self._counter("malformed", "Requests without the headers that a queue needs")
        self.reports = self._counter("load_reports", "Load reports taken in")
        self.turned = self._counter(
            "worker_turns", "Workers that became alive, draining, stale or lost", "state"
        )
        self.loads = self._counter(
            "model_loads", "Loads on demand that workers were asked for and that ended", "outcome", "reason"
        )
        self._show(TallyCollector(self))

    def decided(self, decision: Dispatch | Reject) -> None:
        """A request left the queue, or was not let in."""
        tally = self.bands[band_of(decision.request.priority) - 1]
        if isinstance(decision, Dispatch):
            tally.dispatch(decision.waited_s)
        else:
            tally.refuse(decision.reason, decision.waited_s)

    def cancelled(self, request: Request) -> None:
        """Its caller left while it waited."""
        self.bands[band_of(request.priority) - 1].cancelled += 1

    def ended(self, request: Request, usage: Usage | None) -> None:
        """A lease ended."""
        self.leases_ended += 1
        if usage is not None:
            served = self.served.get(request.tenant, self._others)
            served[0] += usage.prompt_tokens - usage.cached_prompt_tokens
            served[1] += usage.cached_prompt_tokens
            served[2] += usage.completion_tokens

    def watch(self, scheduler: Scheduler, clock: Clock) -> None:
        """Also show the scheduler's gauges."""
        self._show(SchedulerCollector(scheduler, clock, self.served.keys()))

    def close(self) -> None:
        """Take everything out of the registry again."""
        for collector in self._collectors:
            self._registry.unregister(collector)
        self._collectors.clear()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._keep(Counter(PREFIX + name, text, labels, registry=self._registry))

    def _show(self, collector: Collector) -> None:
        self._registry.register(self._keep(collector))

    def _keep(self, collector: C) -> C:
        self._collectors.append(collector)
        return collector


class TallyCollector(Collector):
    """Shows what `BatcherMetrics` counted in plain numbers."""

    def __init__(self, metrics: BatcherMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Requests, waits and tokens."""
        metrics = self._metrics
        requests = CounterMetricFamily(
            PREFIX + "requests",
            "Requests that left the queue or were not let in",
            labels=["outcome", "reason", "band"],
        )
        waits = HistogramMetricFamily(
            PREFIX + "queue_duration_seconds", "From arrival to dispatch", labels=["band"]
        )
        bounds = [*(str(float(bound)) for bound in SECONDS), "+Inf"]
        for band, tally in zip(BANDS, metrics.bands, strict=True):
            for outcome, reason, count in tally.outcomes():
                requests.add_metric([outcome, reason, band], count)
            buckets = [*zip(bounds, map(float, accumulate(tally.wait_counts)), strict=True)]
            waits.add_metric([band], buckets, tally.wait_sum_s)
        tokens = CounterMetricFamily(
            PREFIX + "served_tokens", "Tokens of ended requests", labels=["tenant", "kind"]
        )
        for tenant, served in metrics.served.items():
            for kind, count in zip(("prompt", "cached_prompt", "completion"), served, strict=True):
                tokens.add_metric([tenant, kind], count)
        yield from (requests, waits, tokens)
        yield _counter("leases_ended", "Leases that ended, whatever the cause", metrics.leases_ended)


class SchedulerCollector(Collector):
    """What is read from the scheduler when somebody looks."""

    def __init__(self, scheduler: Scheduler, clock: Clock, tenants: Iterable[str]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._tenants = tuple(tenants)

    def collect(self) -> Iterator[Metric]:
        """Every gauge, and the counters that the scheduler keeps itself."""
        scheduler = self._scheduler
        now = scheduler.gauges(self._clock.monotonic())
        yield from self._queues(now)
        yield from self._pools(now)
        yield self._of_tenants(now)
        yield _gauge("leases", "Requests dispatched and not ended", scheduler.leased)
        yield _gauge("draining", "1 while new requests are refused", scheduler.draining)
        yield _counter("promoted", "Requests that moved up a band after a long wait", now.promoted)
        text = "Prompt tokens of dispatched requests"
        yield _counter("dispatched_prompt_tokens", text, now.placed_tokens)
        text = "Those of them that the picked worker's cache was expected to hold"
        yield _counter("dispatched_matched_tokens", text, now.matched_tokens)

    def _queues(self, now: Gauges) -> Iterator[Metric]:
        shown = {
            "queue_size": "Requests waiting",
            "queue_prompt_tokens": "Prompt tokens waiting",
            "queue_oldest_wait_seconds": "The longest that anybody waiting has waited",
            "queue_estimated_wait_seconds": "Until all who wait in the band or above are dispatched",
        }
        for field, (name, text) in enumerate(shown.items()):
            family = GaugeMetricFamily(PREFIX + name, text, labels=["band"])
            for band, values in zip(BANDS, now.bands, strict=True):
                family.add_metric([band], float(values[field]))
            yield family

    def _pools(self, now: Gauges) -> Iterator[Metric]:
        states = self._scheduler.worker_states()
        workers = GaugeMetricFamily(PREFIX + "workers", "Workers by state", labels=["state"])
        for state in WORKER_STATES:
            workers.add_metric([state], float(states.count(state)))
        yield workers
        yield _gauge("pool_ready", "Models that workers serve, each counted on each worker", now.ready)
        yield _gauge("pool_open", "Those of them that can take a request now", now.open)
        yield _gauge("pool_saturation", "Share that cannot; 1 when nothing is served", now.saturation)

    def _of_tenants(self, now: Gauges) -> Metric:
        counts = {name: [0, 0] for name in self._tenants}
        for name, queued, running in now.tenants:
            count = counts.get(name) or counts[OTHER]
            count[0] += queued
            count[1] += running
        family = GaugeMetricFamily(
            PREFIX + "tenant_requests", "Requests waiting and running", labels=["tenant", "state"]
        )
        for name, (queued, running) in counts.items():
            family.add_metric([name, "queued"], queued)
            family.add_metric([name, "running"], running)
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=float(value))


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)
