"""Reads what is new in the store: versions, aliases, deprecations. It changes nothing.

Everything in a store is immutable or numbered, so one listing says what there is to read; what was read
once is not read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from services.modelstore.core import aliases, deprecations
from services.modelstore.core.aliases import AliasKey, AliasState
from services.modelstore.core.catalogue import Catalogue, StoredVersion
from services.modelstore.core.deprecations import Deprecation
from services.modelstore.core.manifest import (
    ImportRecord,
    ManifestError,
    digest_in_path,
    digests_in,
    import_path,
    manifest_path,
    parse_manifest,
)
from services.modelstore.core.ports import Entry, Objects
from services.modelstore.core.series import record_path
from tokenloom.kit.logs import get_logger

UNREADABLE_RECORDS_MAX = 8
"""Records of one series that are passed over when the newest cannot be read."""

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Broken:
    """A manifest that cannot be read."""

    entry: Entry
    """As it was listed then; once it is listed otherwise, it is read again."""
    named: frozenset[str]
    """The digests that its bytes still show."""


class Reader:
    """What was read so far. Calls of one Reader must not overlap."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._versions: dict[str, StoredVersion] = {}
        self._broken: dict[str, _Broken] = {}
        self._forgotten: set[str] = set()
        self._aliases: dict[tuple[str, str], AliasState] = {}
        self._alias_heads: dict[tuple[str, str], int] = {}
        self._marks: dict[str, Deprecation | None] = {}
        self._mark_heads: dict[str, int] = {}
        self._changed = True

    async def read(self) -> bool:
        """Look for what is new; whether there is anything that `catalogue` has not shown yet."""
        # Aliases first: the versions that they name were there before them, so the versions are found.
        await self._read_aliases()
        await asyncio.gather(self._read_versions(), self._read_marks())
        return self._changed

    async def read_aliases(self) -> bool:
        """Look for new aliases only."""
        await self._read_aliases()
        return self._changed

    def catalogue(self) -> Catalogue:
        """Everything that was read, as one view."""
        self._changed = False
        marks = {digest: mark for digest, mark in self._marks.items() if mark is not None}
        versions = [
            replace(version, deprecation=marks[digest]) if digest in marks else version
            for digest, version in self._versions.items()
        ]
        return Catalogue(versions, self._aliases)

    def named_blobs(self) -> set[str]:
        """The blobs of every manifest that was read, also of those that could not be understood."""
        named = {digest for version in self._versions.values() for digest in version.blobs}
        return named.union(*(broken.named for broken in self._broken.values()))

    def is_broken(self, digest: str) -> bool:
        """Whether there is a manifest that could not be understood when it was read last."""
        return digest in self._broken

    def forget(self, digest: str) -> None:
        """Read this version anew at the next look: what is kept of it was written over."""
        self._forgotten.add(digest)

    def alias(self, model: str, alias: str) -> AliasState | None:
        """As it was read last; one that was taken away has no targets."""
        return self._aliases.get((model, alias))

    async def _read_versions(self) -> None:
        entries = await self._objects.entries("manifests")
        present = {digest: entry for entry in entries if (digest := digest_in_path(entry.path))}
        for digest in self._versions.keys() - present.keys():
            del self._versions[digest]
            self._changed = True
        for digest in self._broken.keys() - present.keys():
            del self._broken[digest]
        self._forgotten &= present.keys()
        new = [(digest, entry) for digest, entry in sorted(present.items()) if self._is_new(digest, entry)]
        await asyncio.gather(*(self._read_version(digest, entry) for digest, entry in new))

    def _is_new(self, digest: str, entry: Entry) -> bool:
        if digest in self._forgotten:
            return True
        broken = self._broken.get(digest)
        return broken.entry != entry if broken else digest not in self._versions

    async def _read_version(self, digest: str, entry: Entry) -> None:
        data = await self._objects.get(manifest_path(digest))
        if data is None:
            return
        self._forgotten.discard(digest)
        try:
            manifest = parse_manifest(data, digest)
        except ManifestError as error:
            self._broken[digest] = _Broken(entry, frozenset(digests_in(data)))
            log.error("manifest skipped", digest=digest, error=str(error))
            return
        record = ImportRecord.from_bytes(await self._objects.get(import_path(digest)))
        self._broken.pop(digest, None)
        self._versions[digest] = StoredVersion(digest, manifest, record)
        self._changed = True

    async def _read_aliases(self) -> None:
        heads = aliases.heads(entry.path for entry in await self._objects.entries(aliases.folder()))
        for name in self._alias_heads.keys() - heads.keys():
            del self._alias_heads[name]
            self._aliases.pop(name, None)
            self._changed = True
        moved = [name for name, number in heads.items() if self._alias_heads.get(name) != number]
        await asyncio.gather(*(self._read_alias(*name, heads[name]) for name in sorted(moved)))

    async def _read_alias(self, model: str, alias: str, number: int) -> None:
        """A record that cannot be read leaves the alias at the one before it."""
        folder = aliases.folder(model, alias)

        def parse(data: bytes, found: int) -> AliasState:
            state = aliases.parse_record(data, AliasKey(model, alias, found))
            return replace(state, sequence=number)

        state = await self._newest(folder, number, parse)
        if state is not None:
            self._aliases[model, alias] = state
            self._changed = True
        self._alias_heads[model, alias] = number

    async def _read_marks(self) -> None:
        found = await self._objects.entries(deprecations.folder())
        heads = deprecations.heads(entry.path for entry in found)
        moved = [digest for digest, number in heads.items() if self._mark_heads.get(digest) != number]
        await asyncio.gather(*(self._read_mark(digest, heads[digest]) for digest in sorted(moved)))

    async def _read_mark(self, digest: str, number: int) -> None:
        folder = deprecations.folder(digest)
        self._marks[digest] = await self._newest(
            folder, number, lambda data, _: deprecations.parse_record(data)
        )
        self._mark_heads[digest] = number
        self._changed = True

    async def _newest(self, folder: str, number: int, parse: Callable[[bytes, int], T]) -> T | None:
        """The newest record of a series that can be read, or None."""
        for found in range(number, max(1, number - UNREADABLE_RECORDS_MAX) - 1, -1):
            path = record_path(folder, found)
            try:
                return parse(await self._objects.get(path) or b"", found)
            except ValueError as error:
                log.error("record skipped", path=path, error=str(error))
        return None
