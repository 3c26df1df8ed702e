"""Versions, aliases and deprecations on top of the objects: the catalogue, kept fresh, and the changes to it.

Several processes may work on one store. Each polls it, so what another one changed is seen within a
poll; each change of its own is seen at once. Reads are answered from memory.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence

from services.modelstore.core import aliases, deprecations
from services.modelstore.core.aliases import AliasKey, AliasState, Target
from services.modelstore.core.catalogue import Catalogue, StoredVersion, not_found
from services.modelstore.core.manifest import ImportRecord, Manifest, blob_path, import_path, manifest_path
from services.modelstore.core.ports import Objects
from services.modelstore.core.refusal import Refused
from services.modelstore.core.series import newest_first, record_path
from services.modelstore.pins import Pins
from services.modelstore.reader import Reader
from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

CHANGE_ATTEMPTS_MAX = 64
"""Races lost to other processes after which a change gives up."""

log = get_logger(__name__)


class Store:
    """Call `refresh` once before the first read."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock
        self._reader = Reader(objects)
        self._refreshing = asyncio.Lock()
        self._changing = asyncio.Lock()
        """Changes of this process come one after the other; only processes race."""
        self._changed = asyncio.Condition()
        self.pins = Pins(objects)
        self.catalogue = Catalogue((), {})
        self.generation = 0
        """Grows by one with each change of the catalogue."""

    async def refresh(self) -> bool:
        """Read what changed in the store; whether anything did."""
        async with self._refreshing:
            changed = await self._reader.read()
            if changed:
                await self._show()
            return changed

    async def newer_than(self, generation: int) -> int:
        """Wait until the catalogue is newer than `generation`; the number it has then."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.generation > generation)
            return self.generation

    async def resolve(self, model: str) -> StoredVersion:
        """As Catalogue.resolve; what is not known is looked for in the store before it is refused."""
        try:
            return self.catalogue.resolve(model)
        except Refused as refusal:
            if refusal.reason != "MODEL_NOT_FOUND" or not await self.refresh():
                raise
            return self.catalogue.resolve(model)

    async def named_blobs(self) -> set[str]:
        """The blobs that the manifests name which are in the store now."""
        await self.refresh()
        return self._reader.named_blobs()

    async def publish(self, manifest: Manifest, source: str) -> tuple[StoredVersion, bool]:
        """Store a manifest whose blobs are all there; the version, and whether it is new.

        One that is there and damaged is mended, and not new. Raises Refused with SERVICE_UNAVAILABLE when a
        blob is gone or damaged after all.
        """
        digest = manifest.digest
        # The record first: a version must not be seen without its time, and a record alone is harmless.
        await self._record_import(digest, source)
        created = await self._create_manifest(manifest)
        # Pins keep the blobs; this is for an import that was held up until its pin had expired.
        for file in manifest.files:
            if await self._objects.size(blob_path(file.digest)) != file.size_bytes:
                if created:
                    await self._objects.delete(manifest_path(digest))
                message = f"{file.path} went missing while {manifest.name} was imported; import it again"
                raise Refused("SERVICE_UNAVAILABLE", message, service="modelstore")
        await self.refresh()
        return self.catalogue.version(digest), created

    async def _record_import(self, digest: str, source: str) -> None:
        path, record = import_path(digest), ImportRecord(self._clock.unix_ms(), source)
        if await self._objects.create(path, record.to_bytes()):
            return
        if ImportRecord.from_bytes(await self._objects.get(path)) == ImportRecord.unknown():
            await self._mend(digest, path, record.to_bytes())

    async def _create_manifest(self, manifest: Manifest) -> bool:
        """Whether there was none. Its name says what it holds: one with other bytes may be written over."""
        path, data = manifest_path(manifest.digest), manifest.to_bytes()
        if await self._objects.create(path, data):
            return True
        found = await self._objects.get(path)
        if found != data:
            await self._mend(manifest.digest, path, data)
        return found is None

    async def _mend(self, digest: str, path: str, data: bytes) -> None:
        # No look may be under way: it could have read the old bytes and end after the new ones are there.
        async with self._refreshing:
            await self._objects.put(path, data)
            self._reader.forget(digest)
        log.warning("object mended", path=path)

    async def set_alias(
        self, model: str, alias: str, targets: Sequence[Target], expected_sequence: int | None
    ) -> AliasState:
        """The alias's new state. Raises Refused: MODEL_NOT_FOUND, FIELD_INVALID, ALIAS_CONFLICT."""
        digests = [target.digest for target in targets]
        if not all(digest in self.catalogue.versions for digest in digests):
            await self.refresh()
        # Held against a delete and a collection that run meanwhile; then looked at once more.
        async with self.pins.hold(self._blobs(digests)):
            await self.refresh()
            wanted = self._check_targets(model, digests)
            state = await self._change_alias(model, alias, tuple(targets), expected_sequence)
            # A delete that ran in between saw no alias; now there is one, and it keeps its versions.
            for version in wanted:
                await self._objects.create(manifest_path(version.digest), version.manifest.to_bytes())
        await self.refresh()
        return state

    async def delete_alias(self, model: str, alias: str, expected_sequence: int | None) -> None:
        """Take an alias away. Raises Refused: MODEL_NOT_FOUND, ALIAS_CONFLICT."""
        await self._change_alias(model, alias, (), expected_sequence)
        await self.refresh()

    async def alias_history(self, model: str, alias: str, limit: int) -> list[AliasState]:
        """The last `limit` changes, newest first. Raises Refused: MODEL_NOT_FOUND."""
        numbers = await self._numbers(aliases.folder(model, alias))
        if not numbers:
            raise not_found(f"{model}@{alias}")
        keys = [AliasKey(model, alias, number) for number in numbers[:limit]]
        found = await asyncio.gather(*(self._objects.get(key.path) for key in keys))
        changes = []
        for key, data in zip(keys, found, strict=True):
            try:
                changes.append(aliases.parse_record(data or b"", key))
            except ValueError as error:
                log.error("record skipped", path=key.path, error=str(error))
        return changes

    async def set_deprecation(self, digest: str, deprecated: bool, message: str) -> StoredVersion:
        """Mark a version, or take its mark away. Raises Refused: MODEL_NOT_FOUND."""
        await self.refresh()
        present = self.catalogue.version(digest).deprecation
        if deprecated != (present is not None) or (present and present.message != message):
            now_ms = self._clock.unix_ms()
            record = deprecations.record_bytes(deprecated, message, now_ms, _change_name())
            why = f"{digest} is being marked by others; try again"
            crowded = Refused("SERVICE_UNAVAILABLE", why, service="modelstore")
            await self._append(deprecations.folder(digest), record, _anything, crowded)
            await self.refresh()
        return self.catalogue.version(digest)

    async def delete_version(self, digest: str) -> None:
        """Forget a version; its blobs go with the next collection. Raises Refused: MODEL_NOT_FOUND,
        MODEL_IN_USE."""
        await self.refresh()
        if self._reader.is_broken(digest):
            # Nobody can be served from it, and there is nothing to write back.
            self._check_unused(digest)
            await self._objects.delete(manifest_path(digest))
            await self.refresh()
            return
        version = self.catalogue.version(digest)
        self._check_unused(digest)
        async with self.pins.hold(version.blobs):
            await self._objects.delete(manifest_path(digest))
            await self._refresh_aliases()
            try:
                self._check_unused(digest)
            except Refused:
                # An alias was pointed at it in between: the version was in use after all.
                await self._objects.create(manifest_path(digest), version.manifest.to_bytes())
                raise
            finally:
                await self.refresh()

    async def _refresh_aliases(self) -> None:
        """See the newest aliases beside the versions known before."""
        async with self._refreshing:
            if await self._reader.read_aliases():
                await self._show()

    async def _show(self) -> None:
        self.catalogue = self._reader.catalogue()
        self.generation += 1
        async with self._changed:
            self._changed.notify_all()

    async def _change_alias(
        self, model: str, alias: str, targets: tuple[Target, ...], expected: int | None
    ) -> AliasState:
        now_ms = self._clock.unix_ms()
        record = aliases.record_bytes(targets, now_ms, _change_name())

        async def allowed(present: int) -> None:
            if targets and expected is None:
                return
            there = present > 0 and bool((await self._state(model, alias, present)).targets)
            if not there and not targets:
                raise not_found(f"{model}@{alias}")
            if expected not in (None, present) and (there or expected != 0):
                raise _conflict(model, alias, f"it is at {present}, not at {expected}")

        crowded = _conflict(model, alias, f"{CHANGE_ATTEMPTS_MAX} changes by others came first")
        number = await self._append(aliases.folder(model, alias), record, allowed, crowded)
        return AliasState(alias, number, targets, now_ms)

    async def _append(
        self, folder: str, record: bytes, allowed: Callable[[int], Awaitable[None]], crowded: Refused
    ) -> int:
        """Create the next record of a series; its number.

        `allowed` raises when the present number forbids it; `crowded` is raised when others are always first.
        """
        async with self._changing:
            for _ in range(CHANGE_ATTEMPTS_MAX):
                present = next(iter(await self._numbers(folder)), 0)
                await allowed(present)
                path = record_path(folder, present + 1)
                # A create that was repeated below, after an answer that was lost, finds its own record.
                if await self._objects.create(path, record) or await self._objects.get(path) == record:
                    return present + 1
        raise crowded

    async def _numbers(self, folder: str) -> list[int]:
        return newest_first(entry.path for entry in await self._objects.entries(folder))

    async def _state(self, model: str, alias: str, number: int) -> AliasState:
        """The alias at its newest number, also when that is newer than the catalogue."""
        known = self._reader.alias(model, alias)
        if known is None or known.sequence != number:
            await self._refresh_aliases()
            known = self._reader.alias(model, alias)
        return known or AliasState(alias, number, ())

    def _blobs(self, digests: Iterable[str]) -> list[str]:
        versions = (self.catalogue.versions.get(digest) for digest in digests)
        return [blob for version in versions if version is not None for blob in version.blobs]

    def _check_targets(self, model: str, digests: Sequence[str]) -> list[StoredVersion]:
        versions = [self.catalogue.version(digest) for digest in digests]
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


async def _anything(present: int) -> None:
    """Allows every change."""


def _change_name() -> str:
    return uuid.uuid4().hex


def _conflict(model: str, alias: str, why: str) -> Refused:
    message = f"{model}@{alias} was changed by somebody else ({why}); read it and try again"
    return Refused("ALIAS_CONFLICT", message, model=model, alias=alias)
