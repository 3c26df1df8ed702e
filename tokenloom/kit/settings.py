"""Settings from the environment, `TOKENLOOM_<SERVICE>_<NAME>`, checked before anything starts.

All problems are reported together, and a prefixed name that no field reads is one of them: a
misspelt setting must not silently become a default.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TOKENLOOM_"


def settings_config(service: str) -> SettingsConfigDict:
    """The `model_config` of one service's settings class."""
    return SettingsConfigDict(env_prefix=f"{PREFIX}{service.upper()}_", extra="forbid", frozen=True)


class ServiceSettings(BaseSettings):
    """What every service can be told."""

    name: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """This instance, in logs and traces."""
    host: str = Field("127.0.0.1", min_length=1)
    """The address that every port of this process is bound to."""
    metrics_port: int = Field(9090, ge=0, le=65535)
    """`/metrics`, `/livez` and `/readyz`; 0 takes a free port."""
    otlp_endpoint: str = ""
    """`host:port` of an OTLP/gRPC collector; empty exports nothing."""
    otlp_flush_ms: int = Field(5000, ge=10, le=60_000)
    trace_sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of traces that start here; a caller's decision is followed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    drain_grace_s: float = Field(20.0, ge=0, le=3600)
    """How long work in flight may go on after SIGTERM."""


class SettingsError(Exception):
    """Every problem of one service's environment, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


S = TypeVar("S", bound=ServiceSettings)


def load_settings(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Read `cls` from `environ` (default: the process's). Raises SettingsError with all problems."""
    env = os.environ if environ is None else environ
    prefix = cls.model_config.get("env_prefix", "")
    given: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in sorted(env.items()):
        if not key.upper().startswith(prefix):
            continue
        field = key[len(prefix) :].lower()
        if field in cls.model_fields:
            given[field] = value
        else:
            problems.append(f"{key}: no such setting; known: {', '.join(sorted(_names(cls)))}")
    try:
        settings = _construct(cls, given)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            where = "_".join(str(part) for part in item["loc"]).upper()
            shown = item.get("input")
            problems.append(f"{prefix}{where}: {item['msg']} (got {shown!r})")
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _names(cls: type[ServiceSettings]) -> list[str]:
    prefix = cls.model_config.get("env_prefix", "")
    return [f"{prefix}{name.upper()}" for name in cls.model_fields]


def _construct(cls: type[S], given: dict[str, Any]) -> S:
    """Validate only what was given: the environment was read above, once, with its problems."""

    class FromGiven(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: Any, init_settings: Any, **_: Any
        ) -> tuple[Any, ...]:
            return (init_settings,)

    FromGiven.__name__ = cls.__name__
    values: S = FromGiven(**given)
    return values
