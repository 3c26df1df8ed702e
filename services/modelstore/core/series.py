"""Series of records: `<folder>/<number>.json`, each created once; the highest number counts."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:.*/)?(0|[1-9][0-9]{0,17})\.json")


def number_of(path: str) -> int | None:
    """The number that a path ends in, or None when it is no record."""
    match = _NUMBER.fullmatch(path)
    return int(match[1]) if match else None


def newest_first(paths: Iterable[str]) -> list[int]:
    """The numbers of a series' records."""
    return sorted((n for path in paths if (n := number_of(path)) is not None), reverse=True)


def record_path(folder: str, number: int) -> str:
    """Where a record of a series is kept."""
    return f"{folder}/{number}.json"
