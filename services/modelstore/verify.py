"""Reads stored blobs and compares them with their digests, several at once.

One sha256 cannot be shared between cores, so the blobs are: as many are read at once as there are threads,
the longest first. The next piece of a blob is read while one is hashed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass

from services.modelstore.core.manifest import (
    ImportRecord,
    blob_in_path,
    blob_path,
    digest_in_path,
    digest_of,
    import_path,
    manifest_path,
)
from services.modelstore.core.ports import Objects, Progress
from services.modelstore.store import Store

READ_BYTES = 8 * 1024 * 1024
PROGRESS_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Damaged:
    """A blob or manifest that is not what its name promises."""

    digest: str
    versions: tuple[str, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class Verified:
    """The end."""

    versions: int
    blobs: int
    bytes: int
    damaged: int


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: str
    promised_bytes: int | None
    """By the manifests; None when no manifest names it."""
    versions: tuple[str, ...]


class Verifier:
    """Hashes at most `threads` blobs at once, over all calls."""

    def __init__(self, store: Store, objects: Objects, threads: int) -> None:
        self._store = store
        self._objects = objects
        self._threads = threads
        self._hashing = asyncio.Semaphore(threads)

    async def run(self, model: str) -> AsyncGenerator[Progress | Damaged | Verified, None]:
        """Progress and what is damaged, then one Verified. Empty `model`: everything in the store.

        Raises Refused: MODEL_NOT_FOUND, FIELD_INVALID.
        """
        await self._store.refresh()
        if model:
            versions = [(await self._store.resolve(model)).digest]
            sizes = await self._sizes_of(versions)
        else:
            versions = await self._manifests()
            sizes = await self._sizes_of_all()
        check = _Check(self._objects, self._hashing, versions, self._blobs(versions, sizes), sizes)
        tasks = check.start(self._threads)
        try:
            while tasks:
                ended, tasks = await asyncio.wait(tasks, timeout=PROGRESS_INTERVAL_S)
                for damaged in check.news():
                    yield damaged
                yield Progress("verify", check.done_bytes, check.total_bytes)
                for task in ended:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        yield check.summary()

    async def _manifests(self) -> list[str]:
        """Also those that cannot be read: they are what this looks for."""
        entries = await self._objects.entries("manifests")
        return sorted(digest for entry in entries if (digest := digest_in_path(entry.path)))

    async def _sizes_of(self, versions: Iterable[str]) -> dict[str, int]:
        named = {blob for v in versions for blob in self._store.catalogue.version(v).blobs}
        sizes = {digest: await self._objects.size(blob_path(digest)) for digest in sorted(named)}
        return {digest: size for digest, size in sizes.items() if size is not None}

    async def _sizes_of_all(self) -> dict[str, int]:
        entries = await self._objects.entries("blobs")
        return {digest: e.size_bytes for e in entries if (digest := blob_in_path(e.path))}

    def _blobs(self, versions: Iterable[str], sizes: Mapping[str, int]) -> list[_Blob]:
        """Every blob that a version names, and every other one that is there; the longest last."""
        promised: dict[str, int] = {}
        users: dict[str, list[str]] = {}
        for digest in versions:
            version = self._store.catalogue.versions.get(digest)
            for file in version.manifest.files if version else ():
                promised[file.digest] = file.size_bytes
                if digest not in users.setdefault(file.digest, []):
                    users[file.digest].append(digest)
        found = [
            _Blob(digest, promised.get(digest), tuple(users.get(digest, ())))
            for digest in {**sizes, **promised}
        ]
        return sorted(found, key=lambda blob: (sizes.get(blob.digest, 0), blob.digest))


class _Check:
    """One run: what is left to do, what was found."""

    def __init__(
        self,
        objects: Objects,
        hashing: asyncio.Semaphore,
        versions: list[str],
        blobs: list[_Blob],
        sizes: Mapping[str, int],
    ) -> None:
        self._objects = objects
        self._hashing = hashing
        self._versions = versions
        self._left = list(blobs)
        self._sizes = sizes
        self._found: list[Damaged] = []
        self._told = 0
        self._blobs = 0
        self.done_bytes = 0
        self.total_bytes = sum(sizes.values())

    def start(self, threads: int) -> set[asyncio.Task[None]]:
        """The tasks that do the work."""
        work = [self._check_manifests(), *(self._check_blobs() for _ in range(threads))]
        return {asyncio.create_task(part) for part in work}

    def news(self) -> list[Damaged]:
        """What was found since the last call."""
        new = self._found[self._told :]
        self._told = len(self._found)
        return new

    def summary(self) -> Verified:
        return Verified(len(self._versions), self._blobs, self.done_bytes, len(self._found))

    async def _check_manifests(self) -> None:
        for digest in self._versions:
            data = await self._objects.get(manifest_path(digest))
            # None: it was deleted since.
            if data is not None and digest_of(data) != digest:
                # The catalogue may know nothing of it; where it came from is noted beside it.
                source = ImportRecord.from_bytes(await self._objects.get(import_path(digest))).source
                origin = f"; it was imported from {source}" if source else ""
                self._find(digest, (digest,), f"wrong digest: its manifest has {digest_of(data)}{origin}")

    async def _check_blobs(self) -> None:
        while self._left:
            blob = self._left.pop()
            async with self._hashing:
                await self._check_blob(blob)

    async def _check_blob(self, blob: _Blob) -> None:
        size = self._sizes.get(blob.digest)
        if size is None:
            self._find(blob.digest, blob.versions, f"missing: {blob.promised_bytes} bytes")
            return
        self._blobs += 1
        if blob.promised_bytes not in (None, size):
            problem = f"wrong size: {size} bytes, its manifest says {blob.promised_bytes}"
            self._find(blob.digest, blob.versions, problem)
            self.done_bytes += size
            return
        try:
            actual = await self._hash(blob_path(blob.digest), size)
        except FileNotFoundError:
            if blob.versions:
                self._find(blob.digest, blob.versions, f"missing: {size} bytes, deleted while this ran")
            return
        if actual != blob.digest:
            self._find(blob.digest, blob.versions, f"wrong digest: {actual}")

    async def _hash(self, path: str, size: int) -> str:
        digest = hashlib.sha256()
        reading: asyncio.Task[bytes] | None = None
        try:
            for start in range(0, size, READ_BYTES):
                piece = await (reading or self._read(path, start, size))
                reading = None
                following = start + READ_BYTES
                if following < size:
                    reading = asyncio.create_task(self._read(path, following, size))
                await asyncio.to_thread(digest.update, piece)
                self.done_bytes += len(piece)
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        return f"sha256:{digest.hexdigest()}"

    async def _read(self, path: str, start: int, size: int) -> bytes:
        return await self._objects.read(path, start, min(start + READ_BYTES, size))

    def _find(self, digest: str, versions: tuple[str, ...], problem: str) -> None:
        self._found.append(Damaged(digest, versions, problem))
