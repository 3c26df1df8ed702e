"""The messages between the modelstore and its converter: one JSON object a line, either way.

One job goes in; progress comes out, then exactly one result or refusal.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from services.modelstore.core.ports import ConversionJob, Converted, Progress
from services.modelstore.core.refusal import Refused

LINE_BYTES_MAX = 1024 * 1024
"""The longest line; a longer one is a defect of the converter."""
CONVERTER = "2"
"""Changes when the same source would give other bytes."""


def encode_job(job: ConversionJob) -> bytes:
    """The line that starts a conversion."""
    return json.dumps({**asdict(job), "options": dict(job.options)}).encode() + b"\n"


def decode_job(line: bytes) -> ConversionJob:
    """Raises TypeError or ValueError when `encode_job` did not make `line`."""
    return ConversionJob(**json.loads(line))


def encode_event(event: Progress | Converted | Refused) -> bytes:
    """One line of the converter's output."""
    return json.dumps(_plain(event)).encode() + b"\n"


def _plain(event: Progress | Converted | Refused) -> dict[str, Any]:
    if isinstance(event, Progress):
        return {"event": "progress", **asdict(event)}
    if isinstance(event, Converted):
        return {"event": "converted", "facts": dict(event.facts), "files": list(event.files)}
    return {
        "event": "refused",
        "reason": event.reason,
        "message": event.message,
        "metadata": event.metadata,
    }


def decode_event(line: bytes) -> Progress | Converted | Refused:
    """Raises KeyError, TypeError or ValueError when `encode_event` did not make `line`."""
    value = json.loads(line)
    kind = value.pop("event")
    if kind == "progress":
        return Progress(**value)
    if kind == "converted":
        return Converted(**value)
    if kind == "refused":
        return Refused(value["reason"], value["message"], **value["metadata"])
    raise ValueError(f"unknown event {kind!r}")
