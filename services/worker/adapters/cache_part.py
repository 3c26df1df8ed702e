"""A blob on its way: a sparse file, and beside it a journal of the ranges that are really there.

A range enters the journal after its bytes were written, so a process that is killed at any moment loses at
most the write that was under way. Neither is synced for that: what a killed process wrote is still the
kernel's. A machine that loses its power may keep a journal that promises lost bytes; then the digest over the
whole file is wrong, and all of it is fetched anew. Synced are the file, before it gets its name, and the
folder, after.

Methods block and are called in threads; `write` by several at once, at different offsets.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from services.worker.adapters.blobfile import Blob, FileHash, sync_folder
from services.worker.adapters.cache_ranges import Ranges

WRITE_BYTES = 128 * 1024
"""Given to the kernel at once. It takes memory for the page cache in pieces as large as the write, and large
ones are often not at hand: a GiB in pieces of 1 MiB cost up to four times the CPU time of one in these."""


class PartFile:
    """Only the holder of the blob's lock may open it."""

    def __init__(self, blob: Blob, size_bytes: int) -> None:
        self._blob = blob
        self._size_bytes = size_bytes
        self._fd = -1
        self._journal = -1
        self._changing = threading.Lock()
        self._here = Ranges()
        self._hash = FileHash(blob.part)

    def open(self) -> int:
        """Open what an earlier fetch left, or an empty file; how many bytes are here."""
        try:
            self._fd = os.open(self._blob.part, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            # A journal without its file speaks of one that is gone.
            self._blob.ranges.unlink(missing_ok=True)
            self._fd = os.open(self._blob.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._here = self._noted()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self._blob.ranges, flags, 0o644)
        self._hash.open()
        return self._here.total

    @property
    def total(self) -> int:
        """Bytes that are here."""
        with self._changing:
            return self._here.total

    @property
    def front(self) -> int:
        """Every byte before this one is here."""
        with self._changing:
            return self._here.front

    @property
    def hashed(self) -> int:
        """Bytes that are in the digest, from the front on."""
        return self._hash.done

    def gaps(self, span_max: int) -> list[tuple[int, int]]:
        """What is missing, from the front on, in pieces of at most `span_max` bytes."""
        with self._changing:
            return list(self._here.gaps(self._size_bytes, span_max))

    def write(self, offset: int, data: memoryview) -> None:
        """Keep `data`, and note that it is here."""
        at, end = offset, offset + len(data)
        while at < end:
            at += os.pwrite(self._fd, data[at - offset : at - offset + WRITE_BYTES], at)
        # The line break comes first: of a line that was cut short, a beginning can only name fewer bytes.
        os.write(self._journal, b"\n%d %d" % (offset, end))
        with self._changing:
            self._here.add(offset, end)

    def hash_to(self, end: int) -> None:
        """Hash on until `end`; all before it must be here."""
        self._hash.to(end)

    def digest(self) -> str:
        """`sha256:…` of what was hashed: read from the file, so of what was really kept."""
        return self._hash.digest()

    def flush(self) -> None:
        """Have what was written until now on the disk: less is left to do at the end."""
        os.fdatasync(self._fd)

    def finish(self) -> None:
        """It is whole and right: give it its name, on disk for good."""
        os.fsync(self._fd)
        self._blob.part.rename(self._blob.path)
        sync_folder(self._blob.path.parent)
        self._blob.ranges.unlink(missing_ok=True)

    def close(self) -> None:
        """Harmless when it was never opened."""
        self._hash.close()
        for fd in (self._fd, self._journal):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal = -1

    def _noted(self) -> Ranges:
        """What the journal says, as far as the file reaches."""
        reach = min(self._size_bytes, os.fstat(self._fd).st_size)
        here = Ranges()
        for line in _lines(self._blob.ranges):
            fields = line.split()
            if len(fields) == 2 and all(field.isdigit() for field in fields):
                start, end = map(int, fields)
                here.add(start, min(end, reach))
        return here


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
