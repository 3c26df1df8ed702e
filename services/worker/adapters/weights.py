"""Weights on this machine's disk: blobs by digest, fetched once, verified before they get their name.

    cache_dir/blobs/sha256/<hex>          a whole, verified blob
    cache_dir/blobs/sha256/<hex>.part     what came so far; a fetch goes on after it
    cache_dir/blobs/sha256/<hex>.lock     held by the one process of this machine that fetches
    cache_dir/models/<hex>/...            one version's files, as hard links to blobs

Bounds: `attempts_max` tries in a row that bring no new byte or a wrong digest; `LOCK_WAIT_MAX_S` for
another process's fetch. Disk and hashing happen in threads.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Protocol

from services.worker.adapters.blobfile import DIGEST_PATTERN, FileLock, PartFile
from services.worker.front.ports import FileRef, ModelVersion
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

LOCK_WAIT_MAX_S = 3600.0
LOCK_POLL_S = 0.1
RETRY_PAUSE_S = 0.2
CHUNK_SILENCE_MAX_S = 60.0
"""A stream of bytes that is silent for so long is given up, and resumed."""

log = get_logger(__name__)


class BlobSource(Protocol):
    """Where missing bytes come from."""

    def fetch(self, digest: str, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on. Raises CallError."""
        ...


class NoWeights:
    """For engines that read none."""

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        """An empty path."""
        progress(1.0)
        return ""


class WeightCache:
    """The front's `Weights` on disk."""

    def __init__(self, cache_dir: Path, source: BlobSource, *, attempts_max: int) -> None:
        self._blobs = cache_dir / "blobs" / "sha256"
        self._models = cache_dir / "models"
        self._source = source
        self._attempts_max = attempts_max

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        """Bring every file here and return the folder. Raises CallError or OSError."""
        _check(version)
        total = sum(file.size_bytes for file in version.files) or 1
        done = 0

        def came(size: int) -> None:
            nonlocal done
            done += size
            progress(min(1.0, max(0.0, done / total)))

        await asyncio.to_thread(self._make_folders)
        for file in version.files:
            await self._ensure(file, came)
        return str(await asyncio.to_thread(self._assemble, version))

    def _make_folders(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._models.mkdir(parents=True, exist_ok=True)

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    async def _ensure(self, file: FileRef, came: Callable[[int], None]) -> None:
        path = self._blob(file.digest)
        if await asyncio.to_thread(_is_whole, path, file.size_bytes):
            came(file.size_bytes)
            return
        lock = FileLock(path.with_suffix(".lock"))
        await self._acquire(lock, file)
        try:
            if await asyncio.to_thread(_is_whole, path, file.size_bytes):
                came(file.size_bytes)
            else:
                await self._fetch(file, path, came)
        finally:
            lock.release()

    async def _acquire(self, lock: FileLock, file: FileRef) -> None:
        waited_s = 0.0
        while not await asyncio.to_thread(lock.try_acquire):
            if waited_s >= LOCK_WAIT_MAX_S:
                raise _load_failed(file, "another process has been fetching it for too long")
            await asyncio.sleep(LOCK_POLL_S)
            waited_s += LOCK_POLL_S

    async def _fetch(self, file: FileRef, path: Path, came: Callable[[int], None]) -> None:
        tries = 0
        while True:
            part = PartFile(path.with_suffix(".part"))
            start = await asyncio.to_thread(part.open)
            came(start)
            try:
                failure = await self._append(file, part, came)
                if failure is None:
                    await asyncio.to_thread(part.finish, path)
                    return
                progressed = part.size > start and failure.reason != "DIGEST_MISMATCH"
                tries = 1 if progressed else tries + 1
                came(-part.size)
                if failure.reason == "DIGEST_MISMATCH":
                    await asyncio.to_thread(part.discard)
            finally:
                await asyncio.to_thread(part.close)
            if tries >= self._attempts_max:
                raise failure
            log.warning("fetching a blob again", file=file.path, digest=file.digest, why=failure.message)
            await asyncio.sleep(RETRY_PAUSE_S * tries)

    async def _append(self, file: FileRef, part: PartFile, came: Callable[[int], None]) -> CallError | None:
        """Fetch what is missing. None when the blob is whole and right; raises what no retry mends."""
        if part.size < file.size_bytes:
            try:
                async with aclosing(self._source.fetch(file.digest, part.size)) as chunks:
                    while (data := await _next_within(chunks, CHUNK_SILENCE_MAX_S)) is not None:
                        await asyncio.to_thread(part.write, data)
                        came(len(data))
                        if part.size > file.size_bytes:
                            break
            except CallError as error:
                if not error.retriable and error.reason != "DIGEST_MISMATCH":
                    raise _load_failed(file, error.message) from error
                return error
        if part.size < file.size_bytes:
            return CallError("SERVICE_UNAVAILABLE", f"{file.path}: the stream ended early")
        actual = part.digest()
        if part.size != file.size_bytes or actual != file.digest:
            why = f"{file.path}: the bytes that came have digest {actual}, not {file.digest}"
            return CallError("DIGEST_MISMATCH", why, metadata={"digest": file.digest, "actual": actual})
        return None

    def _assemble(self, version: ModelVersion) -> Path:
        target = self._models / version.digest.removeprefix("sha256:")
        if _is_complete(target, version):
            return target
        made = self._models / f".{target.name}.{uuid.uuid4().hex}"
        try:
            for file in version.files:
                place = made / file.path
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(self._blob(file.digest), place)
            if target.exists():
                target.rename(made / ".replaced")
            made.rename(target)
        except OSError:
            # Another worker of this machine was faster.
            if not _is_complete(target, version):
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(target / ".replaced", ignore_errors=True)
        return target


async def _next_within(chunks: AsyncGenerator[bytes, None], seconds: float) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(chunks, None), seconds)
    except TimeoutError:
        why = f"no byte came for {seconds:g} s"
        raise CallError("SERVICE_UNAVAILABLE", why, metadata={"service": "modelstore"}) from None


def _check(version: ModelVersion) -> None:
    """Names from outside become paths here: only plain relative ones, and only real digests."""
    for file in (FileRef(version.name, version.digest, 0), *version.files):
        if not DIGEST_PATTERN.fullmatch(file.digest):
            raise _load_failed(file, f"{file.digest[:80]!r} is no sha256 digest")
    for file in version.files:
        path = PurePosixPath(file.path)
        odd = path.is_absolute() or not path.parts or ".." in path.parts
        if odd or "\0" in file.path or "\\" in file.path:
            raise _load_failed(file, f"{file.path[:80]!r} is no relative path")


def _load_failed(file: FileRef, why: str) -> CallError:
    message = f"cannot fetch {file.path[:80]}: {why}"
    return CallError("MODEL_LOAD_FAILED", message, metadata={"model": file.path[:80], "cause": why[:200]})


def _is_whole(path: Path, size_bytes: int) -> bool:
    """A blob gets its name only after its digest was checked, so its size says enough afterwards."""
    try:
        return path.stat().st_size == size_bytes
    except OSError:
        return False


def _is_complete(folder: Path, version: ModelVersion) -> bool:
    return all(_is_whole(folder / file.path, file.size_bytes) for file in version.files) and folder.is_dir()


def _link(blob: Path, place: Path) -> None:
    try:
        os.link(blob, place)
    except OSError:
        # Some file systems have no hard links.
        place.symlink_to(os.path.relpath(blob, place.parent))
