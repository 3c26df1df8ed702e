"""Versions and aliases on top of the objects: the catalogue, kept fresh, and the changes to it.

Several processes may work on one folder. Each polls it, so what another one changed is seen within a
poll; each change of its own is seen at once. Reads are answered from memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.modelstore.core import aliases
from services.modelstore.core.aliases import AliasKey, AliasState, Target
from services.modelstore.core.catalogue import Catalogue, StoredVersion
from services.modelstore.core.manifest import (
    ImportRecord,
    Manifest,
    ManifestError,
    digest_in_path,
    import_path,
    manifest_path,
    parse_manifest,
)
from services.modelstore.core.ports import Objects
from services.modelstore.core.refusal import Refused
from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

ALIAS_ATTEMPTS_MAX = 64
"""Lost races after which a change of an alias without an expected number gives up."""

UNREADABLE_RECORDS_MAX = 8
"""Records of one alias that are passed over when the newest cannot be read."""

log = get_logger(__name__)


class Store:
    """Call `refresh` once before the first read."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock
        self._versions: dict[str, StoredVersion] = {}
        self._aliases: dict[tuple[str, str], AliasState] = {}
        self._broken: set[str] = set()
        """Digests and paths that were complained about once and are left alone."""
        self._refreshing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self.catalogue = Catalogue((), {})
        self.generation = 0
        """Grows by one with each change of the catalogue."""

    async def refresh(self) -> bool:
        """Read what changed in the folder; whether anything did."""
        async with self._refreshing:
            changed = await self._read_versions() | await self._read_aliases()
            if changed or self.generation == 0:
                self.catalogue = Catalogue(self._versions.values(), self._aliases)
                self.generation += 1
                async with self._changed:
                    self._changed.notify_all()
            return changed

    async def newer_than(self, generation: int) -> int:
        """Wait until the catalogue is newer than `generation`; the number it has then."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.generation > generation)
            return self.generation

    async def resolve(self, model: str) -> StoredVersion:
        """As Catalogue.resolve; what is not known is looked for in the folder before it is refused."""
        try:
            return self.catalogue.resolve(model)
        except Refused as refusal:
            if refusal.reason != "MODEL_NOT_FOUND" or not await self.refresh():
                raise
            return self.catalogue.resolve(model)

    async def publish(self, manifest: Manifest, source: str) -> tuple[StoredVersion, bool]:
        """Store a manifest whose blobs are all there; the version, and whether it is new."""
        digest = manifest.digest
        record = ImportRecord(self._clock.unix_ms(), source)
        # The record first: a version must not be seen without its time, and a record alone is harmless.
        await self._objects.create(import_path(digest), record.to_bytes())
        created = await self._objects.create(manifest_path(digest), manifest.to_bytes())
        await self.refresh()
        return self.catalogue.version(digest), created

    async def set_alias(
        self, model: str, alias: str, targets: Sequence[Target], expected_sequence: int | None
    ) -> AliasState:
        """The alias's new state. Raises Refused: MODEL_NOT_FOUND, FIELD_INVALID, ALIAS_CONFLICT."""
        await self.refresh()
        wanted = self._check_targets(model, targets)
        record = aliases.record_bytes(targets, self._clock.unix_ms())
        for _ in range(ALIAS_ATTEMPTS_MAX):
            present = await self._sequence(model, alias)
            if expected_sequence is not None and present != expected_sequence:
                raise _conflict(model, alias, f"it is at {present}, not at {expected_sequence}")
            key = AliasKey(model, alias, present + 1)
            if await self._objects.create(key.path, record):
                # A delete that ran in between saw no alias; now there is one, and it keeps its versions.
                for version in wanted:
                    await self._objects.create(manifest_path(version.digest), version.manifest.to_bytes())
                await self.refresh()
                return AliasState(alias, key.sequence, tuple(targets))
        raise _conflict(model, alias, f"{ALIAS_ATTEMPTS_MAX} changes by others came first")

    async def delete_version(self, digest: str) -> None:
        """Forget a version; its blobs stay. Raises Refused: MODEL_NOT_FOUND, MODEL_IN_USE."""
        await self.refresh()
        version = self.catalogue.version(digest)
        self._check_unused(digest)
        await self._objects.delete(manifest_path(digest))
        await self.refresh_aliases()
        try:
            self._check_unused(digest)
        except Refused:
            # An alias was pointed at it in between: the version was in use after all.
            await self._objects.create(manifest_path(digest), version.manifest.to_bytes())
            raise
        finally:
            await self.refresh()

    async def refresh_aliases(self) -> None:
        """See the newest aliases beside the versions known before."""
        async with self._refreshing:
            if await self._read_aliases():
                self.catalogue = Catalogue(self._versions.values(), self._aliases)

    async def _read_versions(self) -> bool:
        paths = await self._objects.names("manifests")
        present = {digest for path in paths if (digest := digest_in_path(path))}
        gone = self._versions.keys() - present
        for digest in gone:
            del self._versions[digest]
        new = present - self._versions.keys() - self._broken
        for digest in sorted(new):
            await self._read_version(digest)
        return bool(gone or new)

    async def _read_version(self, digest: str) -> None:
        data = await self._objects.get(manifest_path(digest))
        if data is None:
            return
        try:
            manifest = parse_manifest(data, digest)
        except ManifestError as error:
            self._broken.add(digest)
            log.error("manifest skipped", digest=digest, error=str(error))
            return
        record = ImportRecord.from_bytes(await self._objects.get(import_path(digest)))
        self._versions[digest] = StoredVersion(digest, manifest, record)

    async def _read_aliases(self) -> bool:
        heads = aliases.heads(await self._objects.names(aliases.folder()))
        moved = [
            AliasKey(*name, sequence)
            for name, sequence in sorted(heads.items())
            if name not in self._aliases or self._aliases[name].sequence != sequence
        ]
        moved = [key for key in moved if key.path not in self._broken]
        gone = self._aliases.keys() - heads.keys()
        for name in gone:
            del self._aliases[name]
        for key in moved:
            await self._read_alias(key)
        return bool(moved or gone)

    async def _read_alias(self, key: AliasKey) -> None:
        """A record that cannot be read leaves the alias at the one before it."""
        lowest = max(1, key.sequence - UNREADABLE_RECORDS_MAX)
        for sequence in range(key.sequence, lowest - 1, -1):
            record = AliasKey(key.model, key.alias, sequence)
            try:
                state = aliases.parse_record(await self._objects.get(record.path) or b"", record)
            except ValueError as error:
                log.error("alias record skipped", path=record.path, error=str(error))
                continue
            self._aliases[key.model, key.alias] = AliasState(key.alias, key.sequence, state.targets)
            return
        self._broken.add(key.path)

    async def _sequence(self, model: str, alias: str) -> int:
        paths = await self._objects.names(aliases.folder(model, alias))
        return aliases.heads(paths).get((model, alias), 0)

    def _check_targets(self, model: str, targets: Sequence[Target]) -> list[StoredVersion]:
        versions = [self.catalogue.version(target.digest) for target in targets]
        for version in versions:
            if version.manifest.name != model:
                why = f"{version.digest} is a version of {version.manifest.name!r}, not of {model!r}"
                raise Refused("FIELD_INVALID", f"targets: {why}", field="targets")
        return versions

    def _check_unused(self, digest: str) -> None:
        used_by = self.catalogue.used_by(digest)
        if used_by:
            names = ", ".join(used_by)
            message = f"{digest} is named by {names}: point the alias at another version first"
            raise Refused("MODEL_IN_USE", message, model=digest, used_by=names)


def _conflict(model: str, alias: str, why: str) -> Refused:
    message = f"{model}@{alias} was changed by somebody else ({why}); read it and try again"
    return Refused("ALIAS_CONFLICT", message, model=model, alias=alias)
