"""An OpenAI stream as a load client reads it: which pieces of text came, and how it ended. No I/O.

The client shares the machine with what it measures, so only what is counted is looked at, and an event
that differs from the one before in its text alone is not decoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from tokenloom.bench.stats import Record

EVENT_BYTES_MAX = 1024 * 1024
"""A longer event is no answer of a language model."""

DATA = b"data: "
DONE = b"[DONE]"

TEXT_KEYS = {True: b'"content":', False: b'"text":'}
"""By whether the choice has a delta."""
PROBE = "\x00 not what a model says"
FRAMES_MAX = 4
"""Frames that are looked for in one stream; one whose events always change is decoded event by event."""


class Stream:
    """Feeds one response's bytes into its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self._frame: Frame | None = None
        self._frames_left = FRAMES_MAX
        self.done = False

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes the events that `data` completes. Raises ValueError for what is no such stream."""
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise ValueError(f"an event of more than {EVENT_BYTES_MAX:,} bytes")
        for event in events:
            if self._frame is not None and self._frame.holds_text(event):
                self._record.pieces_s.append(now_s)
            elif event.startswith(DATA):
                self._take(event, now_s)

    def _take(self, line: bytes, now_s: float) -> None:
        body = line[len(DATA) :]
        if body == DONE:
            self.done = True
            return
        event: Any = orjson.loads(body)
        if not isinstance(event, dict):
            raise ValueError("an event that is no object")
        texts = [text for choice in event.get("choices", ()) if (text := text_of(choice))]
        self._record.pieces_s += [now_s] * len(texts)
        usage = event.get("usage")
        if usage:
            take_usage(usage, self._record)
        if "error" in event:
            self._record.error = error_reason(event, 200)[0]
        elif texts and not usage and self._frames_left:
            self._frames_left -= 1
            self._frame = Frame.around(line, event)


@dataclass(frozen=True, slots=True)
class Frame:
    """What an event has around its only text, which is all that the next events change.

    So whatever has the same around a JSON string is an event with that text and nothing else to look at:
    one choice, no usage, no error.
    """

    head: bytes
    tail: bytes

    @classmethod
    def around(cls, line: bytes, event: dict[str, Any]) -> Frame | None:
        """None where the text cannot be told from the rest."""
        choices = event["choices"]
        if len(choices) != 1:
            return None
        text = orjson.dumps(text_of(choices[0]))
        head, found, tail = line.partition(TEXT_KEYS["delta" in choices[0]] + text)
        if not found:
            return None
        frame = cls(head + found[: -len(text)], tail)
        # Where another string stands in the text's place, it must be the text.
        other = orjson.loads((frame.head + orjson.dumps(PROBE) + tail)[len(DATA) :])
        return frame if text_of(other["choices"][0]) == PROBE else None

    def holds_text(self, line: bytes) -> bool:
        """Whether it is such an event, and its text is not empty."""
        head, tail = self.head, self.tail
        if not (line.startswith(head) and line.endswith(tail)):
            return False
        try:
            text = orjson.loads(line[len(head) : len(line) - len(tail)])
        except orjson.JSONDecodeError:
            return False
        return isinstance(text, str) and text != ""


def text_of(choice: dict[str, Any]) -> Any:
    """What a choice adds to its text, of either endpoint."""
    return choice["delta"].get("content") if "delta" in choice else choice.get("text")


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
