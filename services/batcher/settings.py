"""What a batcher can be told: `TOKENLOOM_BATCHER_<NAME>`."""

from __future__ import annotations

import json

from pydantic import Field, field_validator

from services.batcher.adapters.discovery import parse_workers
from services.batcher.core.messages import Limits
from tokenloom.kit.settings import ServiceSettings, settings_config

WEIGHT_MIN = 0.001
WEIGHT_MAX = 1000.0


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
    loading_hold_s: float = Field(600.0, ge=0, le=3500)
    """The longest that a request waits while its model is being loaded and no worker serves it yet."""
    load_timeout_s: float = Field(1800.0, ge=1, le=86_400)
    """The longest that a worker is given to load a model on demand."""
    age_promote_s: float = Field(30.0, gt=0, le=3500)
    """A request that waited so long in its band moves up one, though never into the interactive one."""
    affinity_hold_s: float = Field(1.0, ge=0, le=60)
    """The longest that a request waits for a worker whose cache holds its prefix while another is free."""
    late_hold_s: float = Field(60.0, ge=0, le=600)
    """The same for a request whose wish for a first token (x-loom-ttft-slo-ms) cannot be met any more."""
    report_stale_ms: int = Field(200, ge=20, le=60_000)
    """A worker that was silent for so long is not chosen until it reports."""
    queue_depth_max: int = Field(10_000, ge=1, le=1_000_000)
    """Requests that may wait for one model."""
    queue_prompt_tokens_max: int = Field(50_000_000, ge=1)
    """Prompt tokens that may wait for one model."""
    queue_bytes_max: int = Field(1 << 30, ge=1)
    """Bytes of requests that the load balancer may hold for one model."""
    band_shares: tuple[float, float, float, float] = (1.0, 1.0, 0.9, 0.5)
    """How much of each bound of a queue interactive, standard, batch and sheddable may fill, as JSON."""
    tenant_share: float = Field(0.5, gt=0, le=1)
    """How much of each bound of a queue one tenant may fill."""
    tenant_weights: dict[str, float] = Field(default_factory=dict)
    """Shares of tenants beside each other, as JSON; 1 for those not named."""
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

    @field_validator("band_shares", "tenant_weights", mode="before")
    @classmethod
    def _json_is_read(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("band_shares")
    @classmethod
    def _shares_are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share <= 1 for share in value):
            raise ValueError(f"shares are above 0 and at most 1, not {value}")
        return value

    @field_validator("tenant_weights")
    @classmethod
    def _weights_are_weights(cls, value: dict[str, float]) -> dict[str, float]:
        for tenant, weight in value.items():
            if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
                raise ValueError(f"{tenant!r}: a weight is {WEIGHT_MIN} to {WEIGHT_MAX}, not {weight}")
        return value

    def limits(self) -> Limits:
        """The bounds of the core."""
        return Limits(
            hold_max_s=self.hold_max_s,
            no_worker_hold_s=self.no_worker_hold_s,
            loading_hold_s=self.loading_hold_s,
            age_promote_s=self.age_promote_s,
            affinity_hold_s=self.affinity_hold_s,
            late_hold_s=self.late_hold_s,
            report_stale_s=self.report_stale_ms / 1000,
            queue_depth_max=self.queue_depth_max,
            queue_prompt_tokens_max=self.queue_prompt_tokens_max,
            queue_bytes_max=self.queue_bytes_max,
            band_shares=self.band_shares,
            tenant_share=self.tenant_share,
            tenant_weights=self.tenant_weights,
            queues_max=self.queues_max,
            tenants_max=self.tenants_max,
        )
