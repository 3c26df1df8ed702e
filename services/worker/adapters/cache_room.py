"""Keeps the cache inside its bounds: what must leave so that a version can come.

A record is a reservation: it counts in full from before the first byte is fetched. A version may leave when
no living process holds its lease, so never one in use and never a download in progress; the one that was not
used for longest goes first. Before all of them go files that no record names: an older cache's, or what is
left of a version that was given up.

Bounds: `bytes_max` for all blobs together, 0 for none; the disk's free space, of which DISK_KEEP_BYTES stay
free; ROOM_WAIT_MAX_S for another process that makes room. Methods block and are called in threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.worker.adapters.blobfile import HEX_PATTERN, Blob, FileLock, hex_of
from services.worker.adapters.cache_direct import StoreFolder
from services.worker.adapters.cache_records import Entry, Records
from services.worker.front.ports import ModelVersion
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

DISK_KEEP_BYTES = 64 * 1024 * 1024
ROOM_WAIT_MAX_S = 60.0
ROOM_POLL_S = 0.05
BUSY_RETRY_S = 10.0
"""When to ask again for a version that does not fit beside those in use."""
SETTING = "TOKENLOOM_WORKER_CACHE_BYTES_MAX"

log = get_logger(__name__)


class Room:
    """The bounds of one cache folder. `store`: whose files take no room of their own."""

    def __init__(self, records: Records, blobs: Path, bytes_max: int, store: StoreFolder | None) -> None:
        self._records = records
        self._blobs = blobs
        self._bytes_max = bytes_max
        self._store = store

    def reserve(self, version: ModelVersion) -> None:
        """Make room for a version whose lease is held, and write its record.

        Raises CallError: MODEL_TOO_LARGE when it cannot fit, MODEL_MEMORY_BUSY when it could if nothing else
        were in use.
        """
        hex_ = hex_of(version.digest)
        sizes = {hex_of(file.digest): file.size_bytes for file in version.files}
        with self._alone():
            others = [entry for entry in self._records.all() if entry.hex != hex_]
            self._make_room(version.name, Entry(hex_, 0, sizes), others)
            self._records.write(hex_, version.name, sizes)

    def _make_room(self, name: str, mine: Entry, others: list[Entry]) -> None:
        look = _Look(self._blobs, self._store, mine, others)
        needed = look.charged([mine])
        if 0 < self._bytes_max < needed:
            raise self._too_large(name, needed)
        if self._bytes_max and look.disk_lack([]):
            raise self._disk_full(name, look, [])
        with self._records.unused(others) as idle:
            busy = [entry for entry in others if entry not in idle]
            look.pending(busy)
            if self._fits(look, [look.strays, *others]):
                return
            if not self._bytes_max:
                raise self._disk_full(name, look, [look.strays, *others])
            if not self._fits(look, busy):
                raise self._busy(name, look, busy)
            self._evict(look, busy, [look.strays, *idle])

    def _fits(self, look: _Look, kept: list[Entry]) -> bool:
        too_many = self._bytes_max and look.charged([look.mine, *kept]) > self._bytes_max
        return not too_many and not look.disk_lack(kept)

    def _evict(self, look: _Look, busy: list[Entry], leaving: list[Entry]) -> None:
        """Strays first, then the others by their last use, until it fits."""
        # Folders without a record hold on to stray blobs.
        leaving.sort(key=lambda entry: (entry.used_ns, entry.hex))
        while leaving and not self._fits(look, [*busy, *leaving]):
            entry = leaving.pop(0)
            staying = {name for kept in (look.mine, *busy, *leaving) for name in kept.sizes}
            self._remove(entry, [name for name in entry.sizes if name not in staying])

    def _remove(self, entry: Entry, blobs: list[str]) -> None:
        """A kill at any moment leaves a version that is still known, and leaves at the next occasion."""
        if entry.hex:
            self._records.remove_folder(entry)
        for name in blobs:
            blob = Blob(self._blobs / name)
            lock = FileLock(blob.lock)
            if lock.try_acquire():
                blob.discard()
                lock.release(remove=True)
        if entry.hex:
            self._records.remove(entry)
        log.info("left the cache", version=entry.hex, blobs=len(blobs))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self._records.versions / "room.lock")
        give_up_s = time.monotonic() + ROOM_WAIT_MAX_S
        while not lock.try_acquire():
            if time.monotonic() > give_up_s:
                why = f"another process has been making room in {self._blobs} for {ROOM_WAIT_MAX_S:g} s"
                raise CallError("MODEL_LOAD_FAILED", why, metadata={"cause": why[:200]})
            time.sleep(ROOM_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _too_large(self, name: str, needed: int) -> CallError:
        why = (
            f"{name} has {needed} bytes of files, more than the cache may hold: raise {SETTING} "
            f"({self._bytes_max}), or set it to 0 for no bound"
        )
        return _sized("MODEL_TOO_LARGE", why, needed, self._bytes_max)

    def _busy(self, name: str, look: _Look, busy: list[Entry]) -> CallError:
        needed = look.charged([look.mine])
        used = look.charged([look.mine, *busy]) - needed
        free = max(0, self._bytes_max - used)
        why = (
            f"{name} needs {needed} bytes of the cache; {used} of {self._bytes_max} belong to models that "
            f"workers of this node use: unload one, or raise {SETTING}"
        )
        if lack := look.disk_lack(busy):
            needed, free = look.missing_bytes, max(0, look.missing_bytes - lack)
            why = (
                f"{name} needs {needed} more bytes under {self._blobs}, but its disk has room for {free} "
                "beside the models that workers of this node use: unload one, or free some of it"
            )
        about = {"needed_bytes": needed, "free_bytes": free, "budget_bytes": self._bytes_max}
        metadata = {key: str(value) for key, value in about.items()}
        return CallError("MODEL_MEMORY_BUSY", why, metadata=metadata, retry_after_s=BUSY_RETRY_S)

    def _disk_full(self, name: str, look: _Look, kept: list[Entry]) -> CallError:
        needed = look.missing_bytes
        available = max(0, needed - look.disk_lack(kept))
        cure = "" if self._bytes_max else f", or set {SETTING} so that models leave that nobody uses"
        why = (
            f"{name} needs {needed} more bytes under {self._blobs}, but its disk has room for {available}: "
            f"free some of it{cure}"
        )
        return _sized("MODEL_TOO_LARGE", why, needed, available)


class _Look:
    """What is on the disk, seen once; what leaves afterwards is counted, not looked at again."""

    def __init__(self, blobs: Path, store: StoreFolder | None, mine: Entry, others: list[Entry]) -> None:
        self.mine = mine
        self._folder = blobs
        self._store = store
        names = {path.stem for path in blobs.iterdir()}
        there = {name: Blob(blobs / name) for name in names if HEX_PATTERN.fullmatch(name)}
        self._linked = {name for name, blob in there.items() if store and store.is_linked(blob)}
        self._disk = {n: 0 if n in self._linked else blob.disk_bytes() for n, blob in there.items()}
        known = set(mine.sizes).union(*(entry.sizes for entry in others))
        self.strays = Entry("", 0, {name: size for name, size in self._disk.items() if name not in known})
        """Blobs of no version, as if they were one."""
        stat = os.statvfs(blobs)
        self._free = stat.f_bavail * stat.f_frsize - DISK_KEEP_BYTES
        self.missing_bytes = self._missing(mine.sizes)

    def charged(self, entries: list[Entry]) -> int:
        """Bytes of their blobs, each counted once, and not those that are the store's own files."""
        sizes = {name: size for entry in entries for name, size in entry.sizes.items()}
        return sum(0 if self._is_free(name, size) else size for name, size in sizes.items())

    def pending(self, busy: list[Entry]) -> None:
        """Take off the free space what other downloads in progress will still fill."""
        sizes = {name: size for entry in busy for name, size in entry.sizes.items()}
        self._free -= self._missing({n: size for n, size in sizes.items() if n not in self.mine.sizes})

    def disk_lack(self, kept: list[Entry]) -> int:
        """Bytes that the disk has too few when only these stay. A version that is here lacks nothing."""
        staying = {name for entry in (self.mine, *kept) for name in entry.sizes}
        freed = sum(size for name, size in self._disk.items() if name not in staying)
        return max(0, self.missing_bytes - self._free - freed) if self.missing_bytes else 0

    def _missing(self, sizes: Mapping[str, int]) -> int:
        wanted = {name: size for name, size in sizes.items() if not self._is_free(name, size)}
        return sum(max(0, size - self._disk.get(name, 0)) for name, size in wanted.items())

    def _is_free(self, name: str, size: int) -> bool:
        if name in self._linked:
            return True
        if self._store is None or self._disk.get(name):
            return False
        return self._store.offers(Blob(self._folder / name), size)


def _sized(reason: str, why: str, needed: int, available: int) -> CallError:
    about = {"needed_bytes": str(needed), "available_bytes": str(available)}
    return CallError(reason, why, metadata=about)
