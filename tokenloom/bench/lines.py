"""What a bench in a process of its own says while it runs: one JSON object a line on its output."""

from __future__ import annotations

import msgspec

from tokenloom.bench.report import Prefix
from tokenloom.bench.stats import Level


class Note(msgspec.Struct, frozen=True, tag="note"):
    """What it is about to do."""

    text: str


class About(msgspec.Struct, frozen=True, tag="about"):
    """What was loaded, and how the prompts are made."""

    engine: dict[str, str | int | float]
    workload: dict[str, str | int | float]
    protocol: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Requests of the present level that have ended."""

    done: int
    total: int
    tokens: int


class Measured(msgspec.Struct, frozen=True, tag="level"):
    """A level has ended."""

    level: Level


class Cached(msgspec.Struct, frozen=True, tag="prefix"):
    """The comparison of cold and cached prompts has ended."""

    prefix: Prefix


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Nothing further comes. One line that says what is wrong."""

    message: str


Line = Note | About | Progress | Measured | Cached | Failed

_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def encode(line: Line) -> str:
    """Without the line's end."""
    return msgspec.json.encode(line).decode()


def decode(line: bytes | str) -> Line:
    """Raises msgspec.ValidationError or DecodeError for anything else."""
    return _decoder.decode(line)
