"""Two small things on disk: a blob that grows until it is whole, and a lock between processes.

Every method here blocks and is called in a thread, except `PartFile.size` and `digest`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import IO

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
READ_BYTES = 4 * 1024 * 1024


class PartFile:
    """A blob on its way. Its hash is kept as bytes come; an earlier part is hashed when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self.size = 0
        """Bytes so far."""

    def open(self) -> int:
        """Open for appending; how many bytes an earlier fetch left."""
        self._file = self._path.open("a+b")
        self._file.seek(0)
        while data := self._file.read(READ_BYTES):
            self._hash.update(data)
            self.size += len(data)
        return self.size

    def write(self, data: bytes) -> None:
        """Append."""
        assert self._file is not None, "open comes first"
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def digest(self) -> str:
        """`sha256:…` of what is here."""
        return f"sha256:{self._hash.hexdigest()}"

    def finish(self, path: Path) -> None:
        """It is whole and right: give it its name, on disk for good."""
        assert self._file is not None, "open comes first"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.rename(path)

    def discard(self) -> None:
        """It is wrong: forget it."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Harmless when it was never opened."""
        if self._file is not None:
            self._file.close()


class FileLock:
    """An advisory lock on a file; the kernel frees it when its process ends, whatever the cause."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def try_acquire(self) -> bool:
        """True when it is ours now."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def release(self) -> None:
        """Harmless when it is not ours. The file stays: removing it would race with the next holder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
