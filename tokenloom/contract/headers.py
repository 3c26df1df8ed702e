"""The `x-loom-*` metadata of one request: names, and one typed value that is encoded and parsed.

Who sets what: the gateway everything in `RequestHeaders`; the batcher `LEASE` and `QUEUED_MS`; the
worker `WORKER` in response headers and `USAGE_BIN` in trailers. The edge strips what comes from
outside.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX = "x-loom-"

REQUEST_ID = "x-loom-request-id"
ARRIVAL_UNIX_MS = "x-loom-arrival-unix-ms"
DEADLINE_UNIX_MS = "x-loom-deadline-unix-ms"
MODEL = "x-loom-model"
TENANT = "x-loom-tenant"
PRIORITY = "x-loom-priority"
PROMPT_TOKENS = "x-loom-prompt-tokens"
MAX_NEW_TOKENS = "x-loom-max-new-tokens"
PREFIX_BIN = "x-loom-prefix-bin"
ATTEMPT = "x-loom-attempt"
TTFT_SLO_MS = "x-loom-ttft-slo-ms"
BYTES = "x-loom-bytes"
MODEL_BYTES = "x-loom-model-bytes"

LEASE = "x-loom-lease"
QUEUED_MS = "x-loom-queued-ms"

WORKER = "x-loom-worker"
USAGE_BIN = "x-loom-usage-bin"

MODEL_DEPRECATED = "x-loom-model-deprecated"

DESTINATION = "x-gateway-destination-endpoint"
DROPPED_REASON = "x-llm-d-request-dropped-reason"
FAIRNESS_ID = "x-llm-d-inference-fairness-id"
FAIRNESS_ID_OLD = "x-gateway-inference-fairness-id"
DEFAULT_TENANT = "default"
SLO_TTFT_MS = "x-llm-d-slo-ttft-ms"
SLO_TTFT_MS_OLD = "x-slo-ttft-ms"
SESSION_ID = "x-session-id"

HASH_BYTES = 8
PREFIX_HASHES_MAX = 256
"""2 KiB of hashes: gRPC refuses metadata above 8 KiB."""
NAME_CHARS_MAX = 128
"""Longest request id and tenant."""
TOKENS_MAX = 1 << 31
TTFT_SLO_MS_MAX = 3_600_000
BYTES_MAX = 1 << 31
MODEL_BYTES_MAX = 1 << 50


class HeaderError(ValueError):
    """A header is missing or out of bounds. `field` is its name."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    """What the batcher must know of a request, so that nobody re-reads the prompt."""

    request_id: str
    arrival_unix_ms: int
    deadline_unix_ms: int
    model: str
    """`sha256:…` of the version."""
    tenant: str
    priority: int
    """loom.inference.v1.Priority."""
    prompt_tokens: int
    max_new_tokens: int
    prefix: tuple[int, ...] = field(default=())
    """Hashes of `HASH_BYTES` bytes as little-endian numbers, one for each 512 prompt tokens."""
    attempt: int = 1
    ttft_slo_ms: int = 0
    """From arrival to the first token, as the caller wishes; 0: no wish."""
    size_bytes: int = 0
    """Of the serialised request that the proxy holds while it waits; 0: not said."""
    model_bytes: int = 0
    """Of the model's weights, for choosing where to load it; 0: not said."""

    def encode(self) -> list[tuple[str, str | bytes]]:
        """As gRPC metadata."""
        pairs: list[tuple[str, str | bytes]] = [
            (REQUEST_ID, self.request_id),
            (ARRIVAL_UNIX_MS, str(self.arrival_unix_ms)),
            (DEADLINE_UNIX_MS, str(self.deadline_unix_ms)),
            (MODEL, self.model),
            (TENANT, self.tenant),
            (PRIORITY, str(self.priority)),
            (PROMPT_TOKENS, str(self.prompt_tokens)),
            (MAX_NEW_TOKENS, str(self.max_new_tokens)),
            (ATTEMPT, str(self.attempt)),
        ]
        if self.prefix:
            sent = self.prefix[:PREFIX_HASHES_MAX]
            pairs.append((PREFIX_BIN, struct.pack(f"<{len(sent)}Q", *sent)))
        if self.ttft_slo_ms:
            pairs.append((TTFT_SLO_MS, str(self.ttft_slo_ms)))
        if self.size_bytes:
            pairs.append((BYTES, str(self.size_bytes)))
        if self.model_bytes:
            pairs.append((MODEL_BYTES, str(self.model_bytes)))
        return pairs

    @classmethod
    def parse(cls, headers: Mapping[str, str | bytes]) -> RequestHeaders:
        """Read them back. Raises HeaderError naming the first header that is missing or wrong."""
        return cls(
            request_id=_text(headers, REQUEST_ID),
            arrival_unix_ms=_integer(headers, ARRIVAL_UNIX_MS, 0, 1 << 53),
            deadline_unix_ms=_integer(headers, DEADLINE_UNIX_MS, 0, 1 << 53),
            model=_text(headers, MODEL),
            tenant=_text(headers, TENANT),
            priority=_integer(headers, PRIORITY, 0, 4),
            prompt_tokens=_integer(headers, PROMPT_TOKENS, 1, TOKENS_MAX),
            max_new_tokens=_integer(headers, MAX_NEW_TOKENS, 1, TOKENS_MAX),
            prefix=_hashes(headers.get(PREFIX_BIN)),
            attempt=_integer(headers, ATTEMPT, 1, 1 << 16),
            ttft_slo_ms=_integer(headers, TTFT_SLO_MS, 1, TTFT_SLO_MS_MAX) if TTFT_SLO_MS in headers else 0,
            size_bytes=_integer(headers, BYTES, 1, BYTES_MAX) if BYTES in headers else 0,
            model_bytes=_integer(headers, MODEL_BYTES, 1, MODEL_BYTES_MAX) if MODEL_BYTES in headers else 0,
        )


def _text(headers: Mapping[str, str | bytes], name: str) -> str:
    value = headers.get(name)
    if value is None:
        raise HeaderError(name, "is missing")
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if not 1 <= len(text) <= NAME_CHARS_MAX:
        raise HeaderError(name, f"must have 1 to {NAME_CHARS_MAX} characters, not {len(text)}")
    return text


def _integer(headers: Mapping[str, str | bytes], name: str, low: int, high: int) -> int:
    text = _text(headers, name)
    if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
        raise HeaderError(name, f"must be a whole number from {low} to {high}, not {text[:32]!r}")
    return int(text)


def _hashes(value: str | bytes | None) -> tuple[int, ...]:
    """gRPC gives `-bin` metadata as bytes; a proxy's copy of the headers holds base64 without padding."""
    if not value:
        return ()
    if isinstance(value, str):
        try:
            value = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise HeaderError(PREFIX_BIN, "is not base64") from None
    if len(value) % HASH_BYTES or len(value) > HASH_BYTES * PREFIX_HASHES_MAX:
        bound = f"at most {PREFIX_HASHES_MAX} hashes of {HASH_BYTES} bytes"
        raise HeaderError(PREFIX_BIN, f"must hold {bound}, not {len(value)} bytes")
    return struct.unpack(f"<{len(value) // HASH_BYTES}Q", value)
