"""What a batcher can be told: `TOKENLOOM_BATCHER_<NAME>`."""

from __future__ import annotations

from pydantic import Field, field_validator

from services.batcher.adapters.discovery import parse_workers
from services.batcher.core.messages import Limits
from tokenloom.kit.settings import ServiceSettings, settings_config


class BatcherSettings(ServiceSettings):
    """Settings of one replica."""

    model_config = settings_config("batcher")

    port: int = Field(9002, ge=0, le=65535)
    """ext_proc and BatcherService; 0 takes a free port."""
    health_port: int = Field(9003, ge=0, le=65535)
    """gRPC health by the names that endpoint pickers use; 0 takes a free port."""
    workers: str = Field("dns:///worker:9100", min_length=1)
    """`dns:///host:port`, or a comma-separated list of `ip:port`: the same addresses that Envoy has."""
    discovery_interval_s: float = Field(1.0, ge=0.1, le=60)
    """Between two look-ups of a DNS name."""

    hold_max_s: float = Field(600.0, ge=1, le=3500)
    """The longest that a request waits. Envoy's own limit, 3,600 s, stays above it."""
    no_worker_hold_s: float = Field(30.0, ge=0, le=3500)
    """The longest that a request waits for a model that no live worker serves or loads."""
    report_stale_ms: int = Field(200, ge=20, le=60_000)
    """A worker that was silent for so long is not chosen until it reports."""
    queue_depth_max: int = Field(10_000, ge=1, le=1_000_000)
    """Requests that may wait for one model."""
    queue_prompt_tokens_max: int = Field(50_000_000, ge=1)
    """Prompt tokens that may wait for one model."""
    queues_max: int = Field(1_000, ge=1, le=100_000)
    """Models that may be waited for at once."""
    tenants_max: int = Field(10_000, ge=1, le=1_000_000)
    """Tenants that are remembered."""
    watchers_max: int = Field(10_000, ge=1, le=100_000)
    """WatchRequest streams at once."""

    @field_validator("workers")
    @classmethod
    def _workers_can_be_found(cls, value: str) -> str:
        parse_workers(value)
        return value

    def limits(self) -> Limits:
        """The bounds of the core."""
        return Limits(
            hold_max_s=self.hold_max_s,
            no_worker_hold_s=self.no_worker_hold_s,
            report_stale_s=self.report_stale_ms / 1000,
            queue_depth_max=self.queue_depth_max,
            queue_prompt_tokens_max=self.queue_prompt_tokens_max,
            queues_max=self.queues_max,
            tenants_max=self.tenants_max,
        )
