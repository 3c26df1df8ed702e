"""The catalogue: one consistent view of models, versions and aliases, and what a model string means in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.modelstore.core.aliases import AliasState
from services.modelstore.core.deprecations import Deprecation
from services.modelstore.core.manifest import ImportRecord, Manifest
from services.modelstore.core.refusal import Refused
from tokenloom.contract.models import ModelRef, parse_model


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A manifest in the store."""

    digest: str
    manifest: Manifest
    imported: ImportRecord
    deprecation: Deprecation | None = None

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of its files."""
        return tuple(file.digest for file in self.manifest.files)


@dataclass(frozen=True, slots=True)
class Model:
    """All versions and aliases of one name. Newest version first, aliases by name."""

    name: str
    versions: tuple[StoredVersion, ...]
    aliases: tuple[AliasState, ...]

    def alias(self, name: str) -> AliasState | None:
        return next((alias for alias in self.aliases if alias.name == name), None)


class Catalogue:
    """An immutable view. Models without any version are left out, and aliases that were taken away."""

    def __init__(
        self, versions: Iterable[StoredVersion], aliases: Mapping[tuple[str, str], AliasState]
    ) -> None:
        self.versions: Mapping[str, StoredVersion] = {v.digest: v for v in versions}
        by_name: dict[str, list[StoredVersion]] = {}
        for version in self.versions.values():
            by_name.setdefault(version.manifest.name, []).append(version)
        self.models: Mapping[str, Model] = {
            name: Model(
                name,
                tuple(sorted(found, key=lambda v: (-v.imported.created_unix_ms, v.digest))),
                tuple(
                    state for (model, _), state in sorted(aliases.items()) if model == name and state.targets
                ),
            )
            for name, found in sorted(by_name.items())
        }
        self.blob_sizes: Mapping[str, int] = {
            file.digest: file.size_bytes for v in self.versions.values() for file in v.manifest.files
        }

    def version(self, digest: str) -> StoredVersion:
        """Raises Refused with MODEL_NOT_FOUND."""
        found = self.versions.get(digest)
        if found is None:
            raise not_found(digest)
        return found

    def resolve(self, text: str) -> StoredVersion:
        """The one version that a model string means now; of an alias with several, the greatest share.

        Raises Refused: FIELD_INVALID for a string that is none, MODEL_NOT_FOUND.
        """
        try:
            ref = parse_model(text)
        except ValueError as error:
            raise Refused("FIELD_INVALID", f"model: {error}", field="model") from None
        model = self.models.get(ref.name)
        if model is None:
            raise not_found(text, f"known: {', '.join(self.models) or 'none; import one'}")
        return self._by_digest(model, ref) if ref.digest_prefix else self._by_alias(model, ref)

    def used_by(self, digest: str) -> list[str]:
        """The aliases that name a version, as `model@alias`."""
        return [
            f"{model.name}@{alias.name}"
            for model in self.models.values()
            for alias in model.aliases
            if any(target.digest == digest for target in alias.targets)
        ]

    def _by_alias(self, model: Model, ref: ModelRef) -> StoredVersion:
        alias = model.alias(ref.alias or "")
        if alias is None:
            names = ", ".join(a.name for a in model.aliases) or "none"
            raise not_found(str(ref), f"aliases of {model.name}: {names}")
        return self.version(alias.main)

    def _by_digest(self, model: Model, ref: ModelRef) -> StoredVersion:
        prefix = ref.digest_prefix or ""
        found = [version for version in model.versions if version.digest.startswith(prefix)]
        if not found:
            raise not_found(str(ref), f"{model.name} has {len(model.versions)} other versions")
        if len(found) > 1:
            why = f"{prefix} fits {len(found)} versions of {model.name}: give more digits"
            raise Refused("FIELD_INVALID", f"model: {why}", field="model")
        return found[0]


def not_found(model: str, hint: str = "") -> Refused:
    """No such model, alias or version."""
    shown = model[:160]
    message = f"no model {shown!r}" + (f"; {hint}" if hint else "")
    return Refused("MODEL_NOT_FOUND", message, model=shown)
