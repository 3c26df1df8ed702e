"""Which models there are, and which immutable version a name stands for now.

A snapshot never changes; a new one replaces it. Knows nothing of where snapshots come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.core.refusal import Refusal, Violation, invalid
from tokenloom.contract.models import DEFAULT_ALIAS, ModelRef

NAMES_SHOWN_MAX = 20
"""Known models that an error message lists."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of a version. `digest` is `sha256:…`."""

    path: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """What the gateway must know of one immutable version."""

    name: str
    digest: str
    context_length: int
    vocab_size: int
    stop_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_chat_template: bool = False
    architecture: str = ""
    license: str = ""
    created_unix_ms: int = 0
    files: tuple[FileRef, ...] = ()

    @property
    def full_name(self) -> str:
        """`name@sha256:…`"""
        return f"{self.name}@{self.digest}"

    def file(self, path: str) -> FileRef | None:
        """The file of this path, or None."""
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True, slots=True)
class Target:
    """One share of an alias's traffic; `weight` is relative to the sum."""

    digest: str
    weight: int


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One name: its aliases and versions, the latter by digest."""

    name: str
    aliases: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    versions: Mapping[str, ModelVersion] = field(default_factory=dict)

    def by_alias(self, alias: str, draw: float) -> ModelVersion | None:
        """The version that `draw` in [0, 1) falls to; None when the alias names nothing here."""
        targets = [t for t in self.aliases.get(alias, ()) if t.digest in self.versions]
        total = sum(target.weight for target in targets)
        mark = draw * total
        for target in targets:
            mark -= target.weight
            if mark < 0:
                return self.versions[target.digest]
        return None

    def representative(self) -> ModelVersion | None:
        """What the bare name stands for, or else the first alias; None without any."""
        aliases = sorted(self.aliases, key=lambda alias: (alias != DEFAULT_ALIAS, alias))
        found = (self.by_alias(alias, 0.0) for alias in aliases)
        return next((version for version in found if version is not None), None)

    def by_digest(self, prefix: str) -> list[ModelVersion]:
        """Every version whose digest begins like this."""
        return [version for digest, version in self.versions.items() if digest.startswith(prefix)]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model, by name."""

    models: Mapping[str, ModelEntry]

    def resolve(self, ref: ModelRef, draw: float) -> ModelVersion:
        """One version; `draw` in [0, 1) chooses among an alias's targets.

        Raises Refusal (MODEL_NOT_FOUND, or FIELD_INVALID for an ambiguous digest).
        """
        asked = ref.name if ref.alias == DEFAULT_ALIAS else str(ref)
        entry = self.models.get(ref.name)
        if entry is None:
            raise self._not_found(asked)
        if ref.digest_prefix is None:
            found = entry.by_alias(ref.alias or DEFAULT_ALIAS, draw)
            if found is None:
                known = ", ".join(sorted(entry.aliases)) or "none"
                raise self._not_found(asked, f"; aliases of {ref.name}: {known}")
            return found
        versions = entry.by_digest(ref.digest_prefix)
        if not versions:
            raise self._not_found(asked)
        if len(versions) > 1:
            raise invalid([Violation("model", f"{asked} means {len(versions)} versions: give more digits")])
        return versions[0]

    def in_use(self) -> list[ModelVersion]:
        """Every version that an alias names."""
        digests = {
            target.digest: entry.versions[target.digest]
            for entry in self.models.values()
            for targets in entry.aliases.values()
            for target in targets
            if target.digest in entry.versions
        }
        return [*digests.values()]

    def names(self) -> list[str]:
        """Every string that callers may use without a digest, sorted."""
        return sorted(
            name if alias == DEFAULT_ALIAS else f"{name}@{alias}"
            for name, entry in self.models.items()
            for alias in entry.aliases
            if entry.by_alias(alias, 0.0) is not None
        )

    def _not_found(self, asked: str, more: str = "") -> Refusal:
        names = self.names()
        shown = ", ".join(names[:NAMES_SHOWN_MAX]) or "none"
        rest = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        message = f"model: there is no {asked!r}; known models: {shown}{rest}{more}"
        return Refusal("MODEL_NOT_FOUND", message, metadata={"model": asked})
