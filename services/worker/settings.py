"""What a worker can be told: `TOKENLOOM_WORKER_<NAME>`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tokenloom.contract.models import parse_model
from tokenloom.kit.settings import ServiceSettings, settings_config

STEP_TOKENS = 512
WILDCARDS = frozenset({"0.0.0.0", "::", "[::]"})


class WorkerSettings(ServiceSettings):
    """Settings of the front; those of the engines are passed on to them."""

    model_config = settings_config("worker")

    port: int = Field(9100, ge=0, le=65535)
    """gRPC; 0 takes a free port."""
    advertise: str = ""
    """`ip:port` under which batcher and Envoy know this worker; empty: `host:port`."""
    engine: Literal["torch", "sim"] = "torch"
    models: str = ""
    """Comma-separated `name`, `name@alias` or `name@sha256:…`, made resident at start."""
    models_max: int = Field(8, ge=1, le=64)
    """Models that may be resident, or on their way, at once."""
    memory_bytes: int = Field(0, ge=0)
    """For the engines of all models together; 0: what is free on the device at start, less a share."""
    process_bytes: int = Field(0, ge=0)
    """What a reservation counts for an engine's process beside its model: libraries, and on a GPU context,
    workspaces and graphs. 0: as measured, 512 MiB on a CPU and 2.5 GiB on a GPU."""
    loads_on_demand: bool = True
    """Whether models that `models` does not name may be loaded by command, as the batcher does."""
    min_dwell_s: float = Field(150, ge=0, le=86_400)
    """A model is not evicted for another before it could serve for so long."""
    evict_grace_s: float = Field(30, ge=0, le=3600)
    """For the sequences of an evicted model to end; then they are handed back, to go on elsewhere."""
    failed_keep_s: float = Field(30, ge=0, le=86_400)
    """How long a model that could not be loaded by command is reported as failed."""
    modelstore_target: str = Field("127.0.0.1:9200", min_length=1)
    cache_dir: str = Field("~/.cache/tokenloom/worker", min_length=1)
    """Fetched weights; workers of one node may share it."""
    cache_bytes_max: int = Field(0, ge=0)
    """Of all workers of this node that share `cache_dir`; what is not in use leaves, the version that was
    not used for longest first. 0: no bound but the disk's."""
    fetch_streams: int = Field(4, ge=1, le=64)
    """FetchBlob streams at once, of all files together."""
    store_dir: str = ""
    """The modelstore's folder, when this machine can read it: files are linked from there, not copied."""

    device: str = Field("auto", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_bytes: int = Field(0, ge=0)
    """Of each engine; 0 lets the engine choose."""
    sequences_max: int = Field(64, ge=1, le=4096)
    """Sequences of one model that run at once."""
    step_tokens_max: int = Field(0, ge=0, le=65536)
    """Tokens that one step may compute, decodes and prompt chunks together, at least `sequences_max`;
    0: STEP_TOKENS, or `sequences_max` where that is more."""
    itl_max_ms: int = Field(0, ge=0, le=60_000)
    """About how long a step that decodes may be held up by prompts in it; 0: no bound."""
    block_tokens: int = Field(16, ge=1, le=1024)
    prefix_cache: bool = True
    """Whether a prompt finds blocks of the KV cache that hold its beginning already."""
    pipeline_depth: int = Field(0, ge=0, le=2)
    """2: an engine prepares its next step while it computes the present one. 0: 2 on a GPU, 1 on a CPU."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of each engine; 0: as many as the process may use."""

    unleased_queue_max: int = Field(256, ge=0, le=100_000)
    """Requests of one model that may wait here when the batcher is away."""
    default_timeout_s: float = Field(3600, gt=0, le=86_400)
    """For a request that came without a deadline."""
    report_interval_ms: int = Field(20, ge=1, le=10_000)
    """The least time between two load reports."""
    heartbeat_ms: int = Field(130, ge=5, le=10_000)
    """The longest time between two load reports, also when nothing changed."""

    resolve_backoff_max_s: float = Field(2.0, gt=0, le=600)
    """Between two questions for a model that the modelstore does not have yet."""
    fetch_attempts_max: int = Field(8, ge=1, le=100)
    """Tries in a row that bring no new byte of a blob, or bring a wrong one."""
    load_attempts_max: int = Field(3, ge=1, le=100)
    """Engine starts that may fail before a model counts as failed."""
    load_timeout_s: float = Field(1800, gt=0, le=86_400)
    """For an engine from its start to `ready`."""
    restart_backoff_max_s: float = Field(10.0, gt=0, le=600)
    """Between two starts of a crashed engine."""
    silence_max_s: float = Field(120.0, gt=0, le=3600)
    """An engine that holds sequences and says nothing for so long is killed."""

    sim_step_ms: float = Field(10.0, ge=0, le=60_000)
    """Time of a step of the sim engine, before what its sequences add."""
    sim_sequence_us: float = Field(0.0, ge=0, le=1_000_000)
    """Added to a step for each sequence in it."""
    sim_prefill_tokens_per_s: float = Field(20_000.0, gt=0, le=1e9)
    sim_load_s: float = Field(0.0, ge=0, le=3600)
    """How long the sim engine pretends to load."""

    @property
    def step_tokens(self) -> int:
        """What `step_tokens_max` stands for."""
        return self.step_tokens_max or max(STEP_TOKENS, self.sequences_max)

    @field_validator("models")
    @classmethod
    def _names_are_models(cls, value: str) -> str:
        for entry in split_models(value):
            parse_model(entry)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.host in WILDCARDS and not self.advertise:
            raise ValueError(f"advertise must be set to ip:port when host is {self.host}")
        if 0 < self.step_tokens_max < self.sequences_max:
            raise ValueError(
                f"step_tokens_max ({self.step_tokens_max}) must be at least sequences_max "
                f"({self.sequences_max}): each running sequence takes one token of a step"
            )
        if self.heartbeat_ms < self.report_interval_ms:
            raise ValueError("heartbeat_ms must be at least report_interval_ms")
        if len(split_models(self.models)) > self.models_max:
            raise ValueError("models lists more than models_max entries")
        return self


def split_models(value: str) -> list[str]:
    """The entries of `models`, without blanks."""
    return [entry for part in value.split(",") if (entry := part.strip())]
