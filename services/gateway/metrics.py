"""The gateway's Prometheus metrics. Labels come from closed sets.

`model` is a catalogue name, at most `MODELS_MAX` of them and then `other`; `outcome` is `ok`,
`cancelled` or a reason of `loom.errors.v1`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

MODELS_MAX = 100
OTHER = "other"

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

REQUESTS = Counter(
    "tokenloom_gateway_requests_total",
    "Generations that ended, by door, kind and outcome.",
    ("door", "operation", "outcome"),
)
OPEN = Gauge("tokenloom_gateway_requests_open", "Generations in progress.")
DURATION = Histogram(
    "tokenloom_gateway_request_duration_seconds", "From arrival to the end.", ("model",), buckets=_SECONDS
)
FIRST_TOKEN = Histogram(
    "tokenloom_gateway_time_to_first_token_seconds",
    "From arrival to the first token of an output.",
    ("model",),
    buckets=_SECONDS,
)
TOKENISE = Histogram(
    "tokenloom_gateway_tokenise_seconds", "Rendering and tokenising one prompt.", buckets=_SECONDS
)
PROMPT = Histogram(
    "tokenloom_gateway_prompt_tokens", "Prompt tokens of a generation.", ("model",), buckets=_TOKENS
)
GENERATED = Histogram(
    "tokenloom_gateway_generation_tokens", "Tokens of a generation's outputs.", ("model",), buckets=_TOKENS
)
CACHED = Counter(
    "tokenloom_gateway_cached_prompt_tokens_total", "Prompt tokens that a prefix cache held.", ("model",)
)
FAILED_ATTEMPTS = Counter(
    "tokenloom_gateway_failed_attempts_total", "Calls to workers that ended badly.", ("reason",)
)
TOKENIZER_LOADS = Counter(
    "tokenloom_gateway_tokenizer_loads_total", "Tokenizers that were fetched and parsed."
)
DEPRECATED = Counter(
    "tokenloom_gateway_deprecated_requests_total", "Generations of deprecated versions.", ("model",)
)
RESENT = Counter(
    "tokenloom_gateway_resent_total",
    "Outputs sent to the mesh again: before their first token, or after it.",
    ("kind",),
)


class Gaps:
    """One model's times between two messages of an output: a tenth of a Histogram's cost a message."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_GAPS) + 1)
        """By bucket; the last one takes what is above all bounds."""
        self.sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        """Count one. Only the event loop's thread may."""
        self.counts[bisect_left(_GAPS, gap_s)] += 1
        self.sum_s += gap_s


class ModelMeters:
    """One model's metrics, looked up once a generation and not once a token."""

    def __init__(self, label: str) -> None:
        self.duration = DURATION.labels(label)
        self.first_token = FIRST_TOKEN.labels(label)
        self.inter_token = Gaps()
        self.prompt = PROMPT.labels(label)
        self.generated = GENERATED.labels(label)
        self.cached = CACHED.labels(label)
        self.deprecated = DEPRECATED.labels(label)


def of_model(name: str) -> ModelMeters:
    """The meters of a catalogue name; beyond `MODELS_MAX` names all share one."""
    if name not in _models and len(_models) >= MODELS_MAX:
        name = OTHER
    meters = _models.get(name)
    if meters is None:
        meters = _models[name] = ModelMeters(name)
    return meters


_models: dict[str, ModelMeters] = {}


class GapCollector(Collector):
    """Shows every model's `Gaps` when somebody looks."""

    def collect(self) -> Iterator[Metric]:
        """The inter-token latency, in seconds."""
        family = HistogramMetricFamily(
            "tokenloom_gateway_inter_token_latency_seconds",
            "Between two messages of one output.",
            labels=["model"],
        )
        bounds = [*(str(float(bound)) for bound in _GAPS), "+Inf"]
        for label, meters in [*_models.items()]:
            gaps = meters.inter_token
            buckets = [*zip(bounds, map(float, accumulate(gaps.counts)), strict=True)]
            family.add_metric([label], buckets, gaps.sum_s)
        yield family


REGISTRY.register(GapCollector())
