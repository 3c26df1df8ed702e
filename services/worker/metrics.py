"""The worker's Prometheus metrics: `tokenloom_worker_*`, and the `vllm:` names that pickers,
autoscalers and dashboards of the field already read.

Gauges and token counts are read from the front's state when they are scraped; histograms are fed once
a sequence, the inter-token latency once a step. Labels are model names and closed sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.front.resident import Resident, Stage
from services.worker.front.sequence import Sequence
from services.worker.front.tally import BOUNDS_S

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
FINISHED_REASONS = {"stop": "stop", "length": "length"}
"""Every other outcome is vLLM's `abort`."""

C = TypeVar("C", bound=Collector)

# Key, name, help, buckets.
_HISTOGRAMS = (
    ("ttft", "vllm:time_to_first_token_seconds", "From arrival at the worker to the first token", SECONDS),
    ("e2e", "vllm:e2e_request_latency_seconds", "From arrival at the worker to the last token", SECONDS),
    ("queue", "vllm:request_queue_time_seconds", "From arrival to the first step of the sequence", SECONDS),
    ("prefill", "vllm:request_prefill_time_seconds", "From the first step to the first token", SECONDS),
    ("decode", "vllm:request_decode_time_seconds", "From the first token to the last", SECONDS),
    ("inference", "vllm:request_inference_time_seconds", "From the first step to the last token", SECONDS),
    ("tpot", "vllm:request_time_per_output_token_seconds", "Decode time a token after the first", BOUNDS_S),
    ("prompt", "vllm:request_prompt_tokens", "Prompt tokens of a request", TOKENS),
    ("generation", "vllm:request_generation_tokens", "Tokens drawn here for a request", TOKENS),
    ("max_tokens", "vllm:request_params_max_tokens", "max_new_tokens of a request", TOKENS),
)


class WorkerMetrics:
    """What is counted as it happens."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._collectors: list[Collector] = []
        model = ["model_name"]
        self._histograms = {
            key: self._keep(Histogram(name, text, model, buckets=buckets, registry=registry))
            for key, name, text, buckets in _HISTOGRAMS
        }
        self._success = self._keep(
            Counter(
                "vllm:request_success",
                "Requests that ended, by why",
                [*model, "finished_reason"],
                registry=registry,
            )
        )
        self._requests = self._keep(
            Counter(
                "tokenloom_worker_requests",
                "Sequences that ended, by outcome: stop, length, cancelled or an error's reason",
                ["model", "outcome"],
                registry=registry,
            )
        )
        self._refused = self._keep(
            Counter(
                "tokenloom_worker_refused",
                "Requests refused before they began, by reason",
                ["reason"],
                registry=registry,
            )
        )

    def watch(self, collector: Collector) -> None:
        """Also show what `collector` reads."""
        self._registry.register(collector)
        self._collectors.append(collector)

    def close(self) -> None:
        """Take everything out of the registry again."""
        for collector in self._collectors:
            self._registry.unregister(collector)
        self._collectors.clear()

    def refused(self, reason: str) -> None:
        """A request was refused before it began."""
        self._refused.labels(reason).inc()

    def ended(self, sequence: Sequence, model: str, outcome: str) -> None:
        """A sequence is over."""
        self._requests.labels(model, outcome).inc()
        self._success.labels(model, FINISHED_REASONS.get(outcome, "abort")).inc()
        final = sequence.final
        if final is None or not sequence.started:
            return
        total_ns = sequence.last_ns - sequence.received_ns
        queued_ns = sequence.submitted_ns - sequence.received_ns + final.waiting_ns
        values = {
            "ttft": (sequence.first_ns - sequence.received_ns) * 1e-9,
            "e2e": total_ns * 1e-9,
            "queue": queued_ns * 1e-9,
            "prefill": final.prefill_ns * 1e-9,
            "decode": final.decode_ns * 1e-9,
            "inference": (final.prefill_ns + final.decode_ns) * 1e-9,
            "prompt": sequence.prompt_tokens,
            "generation": sequence.received,
            "max_tokens": sequence.max_new_tokens,
        }
        if sequence.received > 1:
            values["tpot"] = (sequence.last_ns - sequence.first_ns) * 1e-9 / (sequence.received - 1)
        for key, value in values.items():
            self._histograms[key].labels(model).observe(value)

    def _keep(self, collector: C) -> C:
        self._collectors.append(collector)
        return collector


class StateCollector(Collector):
    """What is read from the front's state when somebody looks."""

    def __init__(
        self,
        residents: Callable[[], Iterable[Resident]],
        listeners: Callable[[], int],
        draining: Callable[[], bool],
    ) -> None:
        self._residents = residents
        self._listeners = listeners
        self._draining = draining

    def collect(self) -> Iterator[Metric]:
        """Every gauge and count, one sample a model."""
        residents = list(self._residents())
        yield _plain("tokenloom_worker_load_listeners", "Open WatchLoad streams", self._listeners())
        yield _plain("tokenloom_worker_draining", "1 while new sequences are refused", self._draining())
        yield _states(residents)
        yield from _vllm_gauges(residents)
        yield from _counts(residents)
        yield _pace(residents)


def _plain(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _states(residents: list[Resident]) -> Metric:
    family = GaugeMetricFamily("tokenloom_worker_model_state", "1 for its state", labels=["model", "state"])
    for resident in residents:
        for stage in Stage:
            family.add_metric([resident.version.name, stage.value], float(resident.stage is stage))
    return family


def _vllm_gauges(residents: list[Resident]) -> Iterator[Metric]:
    label = ["model_name"]
    running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch", labels=label)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences not in the batch yet", labels=label)
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", labels=label)
    config = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV cache", labels=[*label, "block_size", "num_gpu_blocks"]
    )
    for resident in residents:
        name, admission, ready = resident.version.name, resident.engine.admission, resident.engine.ready
        running.add_metric([name], admission.running)
        waiting.add_metric([name], admission.waiting)
        if ready is not None:
            usage.add_metric([name], kv_usage(resident))
            config.add_metric([name, str(ready.block_tokens), str(ready.total_blocks)], 1.0)
    yield from (running, waiting, usage, config)


def kv_usage(resident: Resident) -> float:
    """Share of the KV blocks that are in use, 0 to 1."""
    ready = resident.engine.ready
    if ready is None or resident.stage is not Stage.READY:
        return 0.0
    return min(1.0, max(0.0, 1 - resident.engine.admission.load.free_blocks / ready.total_blocks))


def _counts(residents: list[Resident]) -> Iterator[Metric]:
    label = ["model_name"]
    prompt = CounterMetricFamily("vllm:prompt_tokens", "Prompt tokens of sequences begun", labels=label)
    generated = CounterMetricFamily("vllm:generation_tokens", "Tokens drawn", labels=label)
    queries = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens looked up", labels=label)
    hits = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens found in the cache", labels=label)
    restarts = CounterMetricFamily("tokenloom_worker_engine_restarts", "Engine restarts", labels=["model"])
    for resident in residents:
        name, tally = [resident.version.name], resident.engine.tally
        prompt.add_metric(name, tally.prompt_tokens)
        generated.add_metric(name, tally.generated_tokens)
        queries.add_metric(name, tally.prompt_tokens)
        hits.add_metric(name, tally.cached_tokens)
        restarts.add_metric(name, resident.engine.restarts)
    yield from (prompt, generated, queries, hits, restarts)


def _pace(residents: list[Resident]) -> Metric:
    family = HistogramMetricFamily(
        "vllm:inter_token_latency_seconds", "Time between two tokens of a sequence", labels=["model_name"]
    )
    for resident in residents:
        tally = resident.engine.tally
        bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(tally.gap_counts)), strict=True))
        family.add_metric([resident.version.name], buckets, tally.gap_sum_s)
    return family
