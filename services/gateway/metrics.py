"""The gateway's Prometheus metrics. Labels come from closed sets.

`model` is a catalogue name, at most `MODELS_MAX` of them and then `other`; `outcome` is `ok`,
`cancelled` or a reason of `loom.errors.v1`.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

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
INTER_TOKEN = Histogram(
    "tokenloom_gateway_inter_token_latency_seconds",
    "Between two messages of one output.",
    ("model",),
    buckets=_GAPS,
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
RESENT = Counter(
    "tokenloom_gateway_resent_total",
    "Outputs sent to the mesh again: before their first token, or after it.",
    ("kind",),
)


class ModelMeters:
    """One model's metrics, looked up once a generation and not once a token."""

    def __init__(self, label: str) -> None:
        self.duration = DURATION.labels(label)
        self.first_token = FIRST_TOKEN.labels(label)
        self.inter_token = INTER_TOKEN.labels(label)
        self.prompt = PROMPT.labels(label)
        self.generated = GENERATED.labels(label)
        self.cached = CACHED.labels(label)


def of_model(name: str) -> ModelMeters:
    """The meters of a catalogue name; beyond `MODELS_MAX` names all share one."""
    if name not in _models and len(_models) >= MODELS_MAX:
        name = OTHER
    return _models.setdefault(name, ModelMeters(name))


_models: dict[str, ModelMeters] = {}
