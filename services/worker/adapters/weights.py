"""Weights on this machine's disk: blobs by digest, brought here once, verified before anybody uses them.

    cache_dir/blobs/sha256/<hex>...       blobs and what lies beside them: `blobfile`
    cache_dir/versions/<hex>...           which versions are known, and who uses them: `cache_records`
    cache_dir/models/<hex>/...            one version's files, as links to blobs

A folder that was handed out stays until `release` or the end of this process. Bounds: `streams_max` FetchBlob
streams and as many files at once; LOCK_IDLE_MAX_S for another process that brings a blob and makes no
progress; those of `cache_download` and `cache_room`. Disk and hashing happen in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from services.worker.adapters.blobfile import DIGEST_PATTERN, Blob, FileHash, FileLock, hex_of
from services.worker.adapters.cache_direct import StoreFolder, link
from services.worker.adapters.cache_download import HASH_SLICE_BYTES, BlobSource, Came, Downloads, load_failed
from services.worker.adapters.cache_records import Records
from services.worker.adapters.cache_room import Room
from services.worker.adapters.cache_threads import Threads, until
from services.worker.front.ports import FileRef, ModelVersion
from services.worker.settings import WorkerSettings
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

LOCK_IDLE_MAX_S = 600.0
LEASE_WAIT_MAX_S = 60.0
"""For another process that takes this version out of the cache just now."""

log = get_logger(__name__)


class NoWeights:
    """For engines that read none."""

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        """An empty path."""
        progress(1.0)
        return ""

    def release(self, digest: str) -> None:
        """Nothing was held."""


class WeightCache:
    """The front's `Weights` on disk."""

    def __init__(
        self,
        cache_dir: Path,
        source: BlobSource,
        *,
        attempts_max: int,
        streams_max: int = 4,
        bytes_max: int = 0,
        store_dir: Path | None = None,
    ) -> None:
        self._blobs = cache_dir / "blobs" / "sha256"
        self._records = Records(cache_dir)
        self._store = StoreFolder(store_dir) if store_dir else None
        self._room = Room(self._records, self._blobs, bytes_max, self._store)
        # A stream writes while its file is hashed.
        self._threads = Threads(2 * streams_max)
        self._files = asyncio.Semaphore(streams_max)
        self._downloads = Downloads(source, self._threads, streams_max=streams_max, attempts_max=attempts_max)
        self._leases: dict[str, FileLock] = {}

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        """Bring every file here and return the folder. Raises CallError or OSError."""
        _check(version)
        files = {file.digest: file for file in version.files}.values()
        total = sum(file.size_bytes for file in files) or 1
        done = 0

        def came(size: int) -> None:
            nonlocal done
            done += size
            progress(min(1.0, max(0.0, done / total)))

        await self._threads.run(self._make_folders)
        await self._take_lease(version)
        try:
            await self._threads.run(self._room.reserve, version)
            await self._ensure_all(files, came)
            return str(await self._threads.run(self._assemble, version))
        except BaseException:
            self.release(version.digest)
            raise

    def release(self, digest: str) -> None:
        """This process no longer uses a version: it may leave the cache. Harmless when it never did."""
        lease = self._leases.pop(digest, None)
        if lease is not None:
            try:
                self._records.touch(hex_of(digest))
            except OSError as error:
                # Another user's record, or a disk that takes nothing: then it leaves the cache sooner.
                log.warning("last use of a version not noted", version=digest, why=str(error))
            lease.release()

    def _make_folders(self) -> None:
        for folder in (self._blobs, self._records.versions, self._records.models):
            folder.mkdir(parents=True, exist_ok=True)

    async def _take_lease(self, version: ModelVersion) -> None:
        if version.digest in self._leases:
            return
        lease = self._records.lease(hex_of(version.digest))
        if not await self._locked(lease, LEASE_WAIT_MAX_S, lambda: 0):
            why = f"another process has been removing {version.name} for too long"
            raise CallError("MODEL_LOAD_FAILED", why, metadata={"model": version.name, "cause": why})
        self._leases[version.digest] = lease

    async def _ensure_all(self, files: Iterable[FileRef], came: Came) -> None:
        """The first error ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                for file in files:
                    group.create_task(self._ensure(file, came), name=f"bring {file.path}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ensure(self, file: FileRef, came: Came) -> None:
        blob = Blob(self._blobs / hex_of(file.digest))
        async with self._files:
            if not await self._threads.run(blob.is_verified, file.size_bytes):
                lock = FileLock(blob.lock)
                if not await self._locked(lock, LOCK_IDLE_MAX_S, blob.disk_bytes):
                    raise load_failed(file, f"another process holds {blob.lock} and brings nothing")
                try:
                    await self._bring(file, blob, came)
                finally:
                    lock.release()
            else:
                came(file.size_bytes)

    async def _locked(self, lock: FileLock, idle_max_s: float, sign: Callable[[], object]) -> bool:
        """Wait until it is ours. False when whoever holds it gave no `sign` of work for too long."""
        try:
            return await until(lambda: self._threads.run(lock.try_acquire), idle_max_s, sign)
        except BaseException:
            # Cancelled, perhaps in the moment in which it became ours.
            lock.release()
            raise

    async def _bring(self, file: FileRef, blob: Blob, came: Came) -> None:
        """With the lock: what is here already, else the store's own file, else by FetchBlob."""
        if await self._threads.run(blob.is_verified, file.size_bytes):
            came(file.size_bytes)
        elif not await self._is_right(file, blob, came) and not await self._link(file, blob, came):
            await self._downloads.fetch(file, blob, came)

    async def _link(self, file: FileRef, blob: Blob, came: Came) -> bool:
        store = self._store
        if store is None or not await self._threads.run(store.offers, blob, file.size_bytes):
            return False
        if not await self._threads.run(store.link, blob):
            return False
        if not await self._is_right(file, blob, came):
            why = (
                f"{file.path}: the store's blob {file.digest} holds other bytes than its name says: see what "
                "is damaged with `tokenloom models verify`, delete the version and import its model again"
            )
            raise CallError("DIGEST_MISMATCH", why, metadata={"digest": file.digest})
        return True

    async def _is_right(self, file: FileRef, blob: Blob, came: Came) -> bool:
        """Whether a file of this size is here and has the digest; then it is remembered, else forgotten."""
        if not await self._threads.run(blob.is_whole, file.size_bytes):
            return False
        hashed = FileHash(blob.path)
        try:
            await self._threads.run(hashed.open)
            while hashed.done < file.size_bytes:
                end = min(file.size_bytes, hashed.done + HASH_SLICE_BYTES)
                if not (count := await self._threads.run(hashed.to, end)):
                    break
                came(count)
        finally:
            hashed.close()
        if hashed.digest() == file.digest:
            await self._threads.run(blob.remember)
            return True
        came(-hashed.done)
        log.warning("blob is damaged", file=file.path, digest=file.digest, actual=hashed.digest())
        await self._threads.run(blob.discard)
        return False

    def _assemble(self, version: ModelVersion) -> Path:
        """Links, each made at once: a kill in between leaves fewer of them, never a wrong one."""
        folder = self._records.models / hex_of(version.digest)
        folder.mkdir(exist_ok=True)
        for file in version.files:
            blob, place = self._blobs / hex_of(file.digest), folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists() and place.samefile(blob):
                continue
            place.unlink(missing_ok=True)
            try:
                link(blob.resolve(), place)
            except FileExistsError:
                # Another worker of this machine was faster.
                continue
        return folder


def _check(version: ModelVersion) -> None:
    """Names from outside become paths here: only plain relative ones, and only real digests."""
    for file in (FileRef(version.name, version.digest, 0), *version.files):
        if not DIGEST_PATTERN.fullmatch(file.digest):
            raise load_failed(file, f"{file.digest[:80]!r} is no sha256 digest")
    for file in version.files:
        path = PurePosixPath(file.path)
        odd = path.is_absolute() or not path.parts or ".." in path.parts
        if odd or "\0" in file.path or "\\" in file.path:
            raise load_failed(file, f"{file.path[:80]!r} is no relative path")


def weight_cache(settings: WorkerSettings, source: BlobSource) -> WeightCache:
    """The cache of these settings."""
    return WeightCache(
        Path(settings.cache_dir).expanduser(),
        source,
        attempts_max=settings.fetch_attempts_max,
        streams_max=settings.fetch_streams,
        bytes_max=settings.cache_bytes_max,
        store_dir=Path(settings.store_dir).expanduser() if settings.store_dir else None,
    )
