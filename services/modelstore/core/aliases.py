"""Aliases: numbered records that can only be created; the highest number is the alias's state.

Two replicas that change the same alias both try to create the next number: one does, the other reads
again. So the history is linear and nothing is lost, without a lock. A record without targets takes the
alias away; the numbers go on after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.modelstore.core.manifest import canonical

WEIGHT_MAX = 1_000_000
TARGETS_MAX = 16

_PATH = re.compile(r"aliases/([^/]+)/([^/]+)/(0|[1-9][0-9]{0,17})\.json")


@dataclass(frozen=True, slots=True)
class Target:
    """One share of an alias's traffic."""

    digest: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class AliasState:
    """What an alias stands for since its change number `sequence`."""

    name: str
    sequence: int
    targets: tuple[Target, ...]
    """None of them: the alias was taken away."""
    changed_unix_ms: int = 0
    """0 when it is not known."""

    @property
    def main(self) -> str:
        """The version with the greatest share; the first of equals."""
        return max(self.targets, key=lambda target: target.weight).digest


@dataclass(frozen=True, slots=True, order=True)
class AliasKey:
    """Which record of which alias."""

    model: str
    alias: str
    sequence: int

    @property
    def path(self) -> str:
        return f"aliases/{self.model}/{self.alias}/{self.sequence}.json"


def folder(model: str = "", alias: str = "") -> str:
    """Where the records of all aliases, of a model's or of one alias are kept."""
    return "/".join(part for part in ("aliases", model, alias) if part)


def parse_path(path: str) -> AliasKey | None:
    """What a path names, or None when it is no alias record."""
    match = _PATH.fullmatch(path)
    return AliasKey(match[1], match[2], int(match[3])) if match else None


def heads(paths: Iterable[str]) -> dict[tuple[str, str], int]:
    """The highest number of each (model, alias) among some paths."""
    highest: dict[tuple[str, str], int] = {}
    for path in paths:
        key = parse_path(path)
        if key is not None:
            name = (key.model, key.alias)
            highest[name] = max(highest.get(name, 0), key.sequence)
    return highest


def record_bytes(targets: Sequence[Target], changed_unix_ms: int, change: str = "") -> bytes:
    """A record as it is stored. `change` is a name of this change alone: its maker knows its record by it."""
    value: dict[str, Any] = {"targets": [asdict(t) for t in targets], "changed_unix_ms": changed_unix_ms}
    return canonical(value | ({"change": change} if change else {}))


def parse_record(data: bytes, key: AliasKey) -> AliasState:
    """The state that a record holds. Raises ValueError when it is not one."""
    try:
        value: Mapping[str, Any] = json.loads(data)
        targets = tuple(Target(str(t["digest"]), int(t["weight"])) for t in value["targets"])
        changed_unix_ms = int(value.get("changed_unix_ms", 0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key.path} is no alias record: {error!r}") from error
    problem = check_targets(targets) if targets else ""
    if problem:
        raise ValueError(f"{key.path}: {problem}")
    return AliasState(key.alias, key.sequence, targets, changed_unix_ms)


def check_targets(targets: Sequence[Target]) -> str:
    """What is wrong with the targets of a change, and the cure; empty when nothing is."""
    if not targets:
        return "has no target: give at least one version"
    if len(targets) > TARGETS_MAX:
        return f"has {len(targets)} targets: at most {TARGETS_MAX}"
    if len({target.digest for target in targets}) < len(targets):
        return "names a version twice: give it once, with the sum of the weights"
    for target in targets:
        if not 1 <= target.weight <= WEIGHT_MAX:
            return f"weight {target.weight} is out of bounds: use 1 to {WEIGHT_MAX}"
    return ""
