"""Who asks, and until when: what both doors read from headers before anything else."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Span

from services.gateway.core.refusal import Violation, invalid
from tokenloom.contract import headers

REQUEST_ID = "x-request-id"
WHOLE_DIGITS_MAX = 16
"""Longer numbers are not even read."""


@dataclass(frozen=True, slots=True)
class Caller:
    """One call's circumstances. Times are those of this process's clock."""

    door: str
    """`grpc` or `http`."""
    operation: str
    """`chat` or `text_completion`, as gen_ai.operation.name."""
    request_id: str
    tenant: str
    arrival_unix_ms: int
    arrival_s: float
    """Monotonic."""
    deadline_unix_ms: int
    ttft_slo_ms: int
    """Wished for the first token, from arrival; 0: no wish."""
    context: Context
    span: Span
    """The server span, current in `context`."""
    streams: bool
    """The caller sees tokens as they come."""


def request_id_of(metadata: Mapping[str, str | bytes]) -> str:
    """The caller's id, or a new one. Raises Refusal when the caller's cannot be used."""
    return _name(metadata, REQUEST_ID) or uuid.uuid4().hex


def tenant_of(metadata: Mapping[str, str | bytes]) -> str:
    """Whose share the request is charged to. Raises Refusal."""
    named = _name(metadata, headers.FAIRNESS_ID) or _name(metadata, headers.FAIRNESS_ID_OLD)
    return named or headers.DEFAULT_TENANT


def session_key_of(metadata: Mapping[str, str | bytes]) -> str:
    """The session that the caller names in a header; empty without one. Raises Refusal."""
    return _name(metadata, headers.SESSION_ID)


def ttft_slo_ms_of(metadata: Mapping[str, str | bytes]) -> int:
    """The time to the first token that the caller wishes; 0: no wish. Raises Refusal naming the header."""
    for key in (headers.SLO_TTFT_MS, headers.SLO_TTFT_MS_OLD):
        if (value := metadata.get(key)) is not None:
            return _milliseconds(key, value)
    return 0


def _milliseconds(key: str, value: str | bytes) -> int:
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    most = headers.TTFT_SLO_MS_MAX
    if text.isascii() and text.isdigit() and len(text) <= WHOLE_DIGITS_MAX and 1 <= int(text) <= most:
        return int(text)
    bound = f"must be a whole number of milliseconds from 1 to {most}, not {text[:32]!r}"
    raise invalid([Violation(key, bound)])


def _name(metadata: Mapping[str, str | bytes], key: str) -> str:
    value = metadata.get(key) or ""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if len(text) > headers.NAME_CHARS_MAX or not all(" " < character <= "~" for character in text):
        bound = f"must be at most {headers.NAME_CHARS_MAX} printable ASCII characters"
        raise invalid([Violation(key, bound)])
    return text
