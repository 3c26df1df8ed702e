"""Which versions the cache knows, what they consist of, and who uses them.

    versions/<hex>.json      a version's files; its time of change is the version's last use
    versions/<hex>.lease     locked, shared, by every process that uses the version or brings it here
    models/<hex>/...         the version's files under their own names, as links to blobs

Methods block and are called in threads.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.worker.adapters.blobfile import HEX_PATTERN, FileLock

UNKNOWN_NS = -1
"""Last use of a version without a record: before all others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One version, as its record says."""

    hex: str
    used_ns: int
    sizes: Mapping[str, int]
    """Bytes of each blob, by its hex digits."""


class Records:
    """The versions of one cache folder."""

    def __init__(self, cache_dir: Path) -> None:
        self.versions = cache_dir / "versions"
        self.models = cache_dir / "models"

    def lease(self, hex_: str, *, shared: bool = True) -> FileLock:
        """Shared: for who uses a version. Alone: for who takes it away."""
        return FileLock(self.versions / f"{hex_}.lease", shared=shared)

    def write(self, hex_: str, name: str, sizes: Mapping[str, int]) -> None:
        """From now on the version is known, and was just used."""
        made = self.versions / f"{hex_}.writing"
        made.write_text(json.dumps({"name": name, "blobs": dict(sizes)}))
        made.replace(self._record(hex_))

    def touch(self, hex_: str) -> None:
        """The version was used until now."""
        now_ns = time.time_ns()
        try:
            os.utime(self._record(hex_), ns=(now_ns, now_ns))
        except FileNotFoundError:
            # Whoever made room between two uses took it away.
            return

    def all(self) -> list[Entry]:
        """Every version that has a record or a folder, the one that was not used for longest first."""
        known = {path.stem for path in self.versions.glob("*.json")}
        known |= {path.name for path in self.models.iterdir()}
        entries = [self._read(name) for name in known if HEX_PATTERN.fullmatch(name)]
        return sorted(entries, key=lambda entry: (entry.used_ns, entry.hex))

    def remove(self, entry: Entry) -> None:
        """Forget a version; its blobs must be gone, so that a kill in between leaves them accounted for."""
        self._record(entry.hex).unlink(missing_ok=True)
        (self.versions / f"{entry.hex}.writing").unlink(missing_ok=True)

    def remove_folder(self, entry: Entry) -> None:
        """The links go first: as long as they are there, the bytes are."""
        shutil.rmtree(self.models / entry.hex, ignore_errors=True)

    @contextmanager
    def unused(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        """Those that no living process uses; none can begin to before the block ends."""
        held: list[tuple[Entry, FileLock]] = []
        try:
            for entry in entries:
                lock = self.lease(entry.hex, shared=False)
                if lock.try_acquire():
                    held.append((entry, lock))
            yield [entry for entry, _ in held]
        finally:
            for entry, lock in held:
                lock.release(remove=not self._record(entry.hex).exists())

    def _record(self, hex_: str) -> Path:
        return self.versions / f"{hex_}.json"

    def _read(self, hex_: str) -> Entry:
        """A record that cannot be read knows nothing: its blobs count as nobody's."""
        record = self._record(hex_)
        try:
            blobs = json.loads(record.read_bytes())["blobs"]
            sizes = {str(name): int(size) for name, size in blobs.items() if HEX_PATTERN.fullmatch(name)}
            return Entry(hex_, record.stat().st_mtime_ns, sizes)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return Entry(hex_, UNKNOWN_NS, {})
