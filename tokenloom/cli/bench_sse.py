"""An OpenAI stream as a load client reads it: which pieces of text came, and how it ended. No I/O.

The client shares the machine with what it measures, so only what is counted is looked at.
"""

from __future__ import annotations

from typing import Any

import orjson

from tokenloom.bench.stats import Record

EVENT_BYTES_MAX = 1024 * 1024
"""A longer event is no answer of a language model."""

DATA = b"data: "
DONE = b"[DONE]"


class Stream:
    """Feeds one response's bytes into its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self.done = False

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes the events that `data` completes. Raises ValueError for what is no such stream."""
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise ValueError(f"an event of more than {EVENT_BYTES_MAX:,} bytes")
        for event in events:
            if event.startswith(DATA):
                self._take(event[len(DATA) :], now_s)

    def _take(self, body: bytes, now_s: float) -> None:
        if body == DONE:
            self.done = True
            return
        event: Any = orjson.loads(body)
        if not isinstance(event, dict):
            raise ValueError("an event that is no object")
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                self._record.pieces_s.append(now_s)
        if usage := event.get("usage"):
            take_usage(usage, self._record)
        if "error" in event:
            self._record.error = error_reason(event, 200)[0]


def take_usage(usage: dict[str, Any], record: Record) -> None:
    """The tokens that the server counted."""
    record.prompt_tokens = usage.get("prompt_tokens", 0)
    record.output_tokens = usage.get("completion_tokens", 0)
    details = usage.get("prompt_tokens_details") or {}
    record.cached_prompt_tokens = details.get("cached_tokens") or 0


def error_reason(body: object, status: int) -> tuple[str, str]:
    """A short reason and the message of an error in any of the shapes that servers use."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        code = error.get("code") or error.get("type") or ""
        message = str(error.get("message") or error.get("detail") or "")
        if isinstance(code, str) and code:
            return code.upper().replace(" ", "_"), message
        return f"HTTP_{status}", message
    return f"HTTP_{status}", str(error or "")
