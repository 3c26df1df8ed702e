"""What the gateway can be told, as `TOKENLOOM_GATEWAY_<NAME>`."""

from __future__ import annotations

from pydantic import Field, field_validator

from tokenloom.kit.settings import ServiceSettings, settings_config

MIB = 1024 * 1024


class GatewaySettings(ServiceSettings):
    """Ports, neighbours and bounds of one gateway."""

    model_config = settings_config("gateway")

    http_port: int = Field(8000, ge=0, le=65535)
    """The OpenAI-compatible API; 0 takes a free port."""
    grpc_port: int = Field(9000, ge=0, le=65535)
    """`loom.inference.v1`; 0 takes a free port."""
    mesh_target: str = Field("127.0.0.1:9010", min_length=1)
    """The mesh's load balancer: `host:port` or `dns:///host:port`."""
    mesh_channels: int = Field(4, ge=1, le=64)
    """HTTP/2 connections to it."""
    modelstore_target: str = Field("127.0.0.1:9200", min_length=1)
    batcher_target: str = ""
    """Where the state of waiting requests can be asked for (`WatchRequest`): `host:port` of a batcher, or
    `dns:///host:port` of all; empty: nowhere."""

    requests_max: int = Field(20_000, ge=1, le=1_000_000)
    """Generations open at once; more are refused."""
    request_bytes_max: int = Field(16 * MIB, ge=1024, le=256 * MIB)
    """The longest HTTP body."""
    prompt_bytes_max: int = Field(4 * MIB, ge=1024, le=64 * MIB)
    """The longest prompt or chat, as UTF-8 text."""
    default_timeout_s: float = Field(600.0, gt=0, le=86_400)
    """The deadline of calls that set none; none may set a longer one."""

    aliases_max: int = Field(4096, ge=1, le=1_000_000)
    """Aliases of several versions whose turns are kept; of one beyond these a request's version is drawn."""

    attempts_max: int = Field(512, ge=1, le=10_000)
    """Calls to workers for one output; its deadline usually ends them first."""
    breaks_max: int = Field(5, ge=0, le=100)
    """Streams of one output that may break in a row without a new token."""
    backoff_initial_ms: int = Field(20, ge=1, le=60_000)
    backoff_max_ms: int = Field(2_000, ge=1, le=60_000)

    tokenizers_max: int = Field(16, ge=1, le=1_000)
    """Versions whose tokenizers are kept in memory, beside those that a running request uses."""
    tokenizer_bytes_max: int = Field(64 * MIB, ge=1024, le=1024 * MIB)
    """The largest tokenizer file."""
    tokenise_threads: int = Field(2, ge=1, le=64)
    tokenise_inline_chars: int = Field(1024, ge=0, le=MIB)
    """Prompts up to this length are tokenised on the event loop, in less time than a thread change."""

    @field_validator("batcher_target")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.removeprefix("dns:///").rpartition(":")
        if value and not (host and port.isascii() and port.isdigit()):
            raise ValueError(f"{value!r} is no host:port")
        return value
