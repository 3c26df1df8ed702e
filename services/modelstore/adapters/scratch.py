"""Folders for work that is not finished: each is locked by its process and swept when that is gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "lock"


class Scratch:
    """Makes folders below `root`, which lies in the store's own folder so that files can be renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder, removed at the end. Leftovers of processes that were killed go first."""
        self._root.mkdir(parents=True, exist_ok=True)
        self.sweep()
        path = self._root / uuid.uuid4().hex
        path.mkdir()
        with (path / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> int:
        """Remove the folders whose process is gone; how many there were."""
        removed = 0
        with suppress(FileNotFoundError):
            for path in list(self._root.iterdir()):
                removed += self._remove_if_abandoned(path)
        return removed

    def _remove_if_abandoned(self, path: Path) -> bool:
        try:
            handle = os.open(path / _LOCK, os.O_RDONLY)
        except OSError:
            # Between mkdir and lock there is a moment without one: an empty folder may be somebody's.
            with suppress(OSError):
                path.rmdir()
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)
        return True
