"""Deprecations of versions: numbered records that can only be created, as aliases are.

The highest number of a version says whether it is deprecated. A version that was deleted and comes again
is the same version, and its mark is still there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services.modelstore.core.manifest import canonical

MESSAGE_CHARS_MAX = 512

_PATH = re.compile(r"deprecations/([0-9a-f]{64})/(0|[1-9][0-9]{0,17})\.json")


@dataclass(frozen=True, slots=True)
class Deprecation:
    """A mark on a version. It is served as before."""

    message: str
    since_unix_ms: int


def folder(digest: str = "") -> str:
    """Where the records of all versions or of one are kept."""
    return f"deprecations/{digest.removeprefix('sha256:')}" if digest else "deprecations"


def record_path(digest: str, sequence: int) -> str:
    """Where one record is kept."""
    return f"{folder(digest)}/{sequence}.json"


def heads(paths: Iterable[str]) -> dict[str, int]:
    """The highest number of each version among some paths."""
    highest: dict[str, int] = {}
    for path in paths:
        if match := _PATH.fullmatch(path):
            digest = f"sha256:{match[1]}"
            highest[digest] = max(highest.get(digest, 0), int(match[2]))
    return highest


def record_bytes(deprecated: bool, message: str, changed_unix_ms: int, change: str) -> bytes:
    """A record as it is stored; `change` as in an alias's."""
    return canonical(
        {"deprecated": deprecated, "message": message, "changed_unix_ms": changed_unix_ms, "change": change}
    )


def parse_record(data: bytes) -> Deprecation | None:
    """The mark, or None when the record takes it away. Raises ValueError when it is no record."""
    try:
        value: Mapping[str, Any] = json.loads(data)
        mark = Deprecation(str(value["message"]), int(value["changed_unix_ms"]))
        return mark if value["deprecated"] is True else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is no deprecation record: {error!r}") from error


def problems(deprecated: bool, message: str) -> list[tuple[str, str]]:
    """(field, what is wrong and the cure) for each problem of a change."""
    if len(message) > MESSAGE_CHARS_MAX:
        return [("message", f"has {len(message)} characters; at most {MESSAGE_CHARS_MAX}")]
    if message and not deprecated:
        return [("message", "says why a version is deprecated: leave it out, or set deprecated")]
    return []
