"""Files of the cache: a blob and what lies beside it, its digest, a lock between processes.

    <hex>             a whole blob
    <hex>.verified    its size, modification time and inode when its digest was checked
    <hex>.part        what came so far, with holes
    <hex>.ranges      which bytes of the part are there
    <hex>.lock        held by the one process of this machine that writes any of these

Every method here blocks and is called in a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
HEX_PATTERN = re.compile(r"[0-9a-f]{64}")
READ_BYTES = 512 * 1024
"""At once, into one buffer: small enough to stay in a core's cache between reading and hashing."""


def hex_of(digest: str) -> str:
    """The name that a digest has on disk."""
    return digest.removeprefix("sha256:")


class FileHash:
    """The sha256 of a file, from the front on, while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._hash = hashlib.sha256()
        self._buffer = bytearray(READ_BYTES)
        self.done = 0
        """Bytes that are in it."""

    def open(self) -> None:
        """The file must be there."""
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Harmless when it was never opened."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def to(self, end: int) -> int:
        """Hash on until `end`, or until the file ends; how many bytes were added."""
        view = memoryview(self._buffer)
        start = self.done
        while self.done < end:
            count = os.preadv(self._fd, [view[: min(READ_BYTES, end - self.done)]], self.done)
            if not count:
                break
            self._hash.update(view[:count])
            self.done += count
        return self.done - start

    def digest(self) -> str:
        """`sha256:…` of what is in it."""
        return f"sha256:{self._hash.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Blob:
    """Where one blob is, or will be."""

    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_suffix(".part")

    @property
    def ranges(self) -> Path:
        return self.path.with_suffix(".ranges")

    @property
    def lock(self) -> Path:
        return self.path.with_suffix(".lock")

    @property
    def marker(self) -> Path:
        return self.path.with_suffix(".verified")

    def is_whole(self, size_bytes: int) -> bool:
        """Whether a file of this size is there; nothing is said of its bytes."""
        try:
            return self.path.stat().st_size == size_bytes
        except OSError:
            return False

    def is_verified(self, size_bytes: int) -> bool:
        """Whether it is there, and not touched since its digest was checked."""
        try:
            return self.is_whole(size_bytes) and self.marker.read_text() == _identity(self.path)
        except (OSError, UnicodeDecodeError):
            return False

    def remember(self) -> None:
        """Its digest was checked just now, and is right."""
        made = self.marker.with_suffix(".verifying")
        made.write_text(_identity(self.path))
        made.replace(self.marker)

    def disk_bytes(self) -> int:
        """What the blob or its part takes on the disk now."""
        try:
            return self.path.stat().st_size
        except OSError:
            pass
        try:
            return self.part.stat().st_blocks * 512
        except OSError:
            return 0

    def discard(self) -> None:
        """Forget it. A link goes, never what it points to; the journal goes before what it speaks of."""
        for path in (self.marker, self.marker.with_suffix(".verifying"), self.ranges, self.part, self.path):
            path.unlink(missing_ok=True)


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


class FileLock:
    """An advisory lock on a file; the kernel frees it when its process ends, whatever the cause."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._fd = -1

    def try_acquire(self) -> bool:
        """True when it is ours now."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, self._kind | fcntl.LOCK_NB)
                if self._is_there(fd):
                    self._fd = fd
                    return True
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError:
                os.close(fd)
                raise
            # Whoever held it before took the file away: lock the one that has the name now.
            os.close(fd)

    def release(self, *, remove: bool = False) -> None:
        """Harmless when it is not ours. `remove`: also the file; only for one that is held alone."""
        if self._fd >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False


def sync_folder(path: Path) -> None:
    """Names in this folder are on the disk for good."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
