"""Which models there are, and which immutable version a name stands for now.

A snapshot never changes; a new one replaces it. Knows nothing of where snapshots come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.core.canaries import Target
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
class Deprecation:
    """A version that is served as before, but not for ever."""

    message: str
    """Why, and what to use instead."""
    since_unix_ms: int = 0


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
    weight_bytes: int = 0
    """0: not known."""
    deprecation: Deprecation | None = None

    @property
    def full_name(self) -> str:
        """`name@sha256:…`"""
        return f"{self.name}@{self.digest}"

    def file(self, path: str) -> FileRef | None:
        """The file of this path, or None."""
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One name: its aliases and versions, the latter by digest."""

    name: str
    aliases: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    versions: Mapping[str, ModelVersion] = field(default_factory=dict)

    def targets(self, alias: str) -> tuple[Target, ...]:
        """The alias's shares whose versions are here; empty when it names nothing."""
        return tuple(t for t in self.aliases.get(alias, ()) if t.digest in self.versions)

    def main(self, alias: str) -> ModelVersion | None:
        """The version with the largest share, of equal ones the first; None when it names nothing."""
        targets = self.targets(alias)
        return self.versions[_heaviest(targets).digest] if targets else None

    def representative(self) -> ModelVersion | None:
        """What the bare name mainly stands for, or else the first alias; None without any."""
        aliases = sorted(self.aliases, key=lambda alias: (alias != DEFAULT_ALIAS, alias))
        found = (self.main(alias) for alias in aliases)
        return next((version for version in found if version is not None), None)

    def by_digest(self, prefix: str) -> list[ModelVersion]:
        """Every version whose digest begins like this."""
        return [version for digest, version in self.versions.items() if digest.startswith(prefix)]


def _heaviest(targets: Sequence[Target]) -> Target:
    return max(targets, key=lambda target: target.weight)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a model string leaves to choose from: the shares of an alias, or the one version of a digest."""

    entry: ModelEntry
    alias: str
    """`name@alias`, or `name@sha256:…`."""
    targets: tuple[Target, ...]
    """At least one."""

    def version(self, target: Target) -> ModelVersion:
        """The version that a target stands for."""
        return self.entry.versions[target.digest]

    @property
    def main(self) -> ModelVersion:
        """The one with the largest share, for questions that are no traffic."""
        return self.version(_heaviest(self.targets))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model, by name."""

    models: Mapping[str, ModelEntry]

    def candidates(self, ref: ModelRef) -> Candidates:
        """What a request for this may be given.

        Raises Refusal (MODEL_NOT_FOUND, or FIELD_INVALID for an ambiguous digest).
        """
        asked = ref.name if ref.alias == DEFAULT_ALIAS else str(ref)
        entry = self.models.get(ref.name)
        if entry is None:
            raise self._not_found(asked)
        if ref.digest_prefix is None:
            targets = entry.targets(ref.alias or DEFAULT_ALIAS)
            if not targets:
                known = ", ".join(sorted(entry.aliases)) or "none"
                raise self._not_found(asked, f"; aliases of {ref.name}: {known}")
            return Candidates(entry, str(ref), targets)
        versions = entry.by_digest(ref.digest_prefix)
        if not versions:
            raise self._not_found(asked)
        if len(versions) > 1:
            raise invalid([Violation("model", f"{asked} means {len(versions)} versions: give more digits")])
        return Candidates(entry, str(ref), (Target(versions[0].digest, 1),))

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
            if entry.targets(alias)
        )

    def _not_found(self, asked: str, more: str = "") -> Refusal:
        names = self.names()
        shown = ", ".join(names[:NAMES_SHOWN_MAX]) or "none"
        rest = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        message = f"model: there is no {asked!r}; known models: {shown}{rest}{more}"
        return Refusal("MODEL_NOT_FOUND", message, metadata={"model": asked})
