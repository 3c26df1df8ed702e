"""Folders for work that is not finished: each is locked by its process and swept when that is gone.

Most go with the work. A kept one stays when its process is killed, so that a repetition finds it by its
key; it goes when its work is done, or when nobody came back for KEPT_FOR_S.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

KEPT_FOR_S = 7 * 24 * 3600.0
_LOCK = "lock"
_KEPT = "downloads"
_LOCK_ATTEMPTS_MAX = 8
"""Folders that may be removed by others between being opened and being locked."""


class Busy(Exception):
    """Another process, or another import of this one, works in the folder."""


@dataclass(slots=True)
class Kept:
    """A folder that survives its process."""

    path: Path
    done: bool = False
    """Set it when nothing in the folder is needed any more."""


class Scratch:
    """Makes folders below `root`, which lies in the store's own folder so that files can be renamed.

    Beginning and end of a folder block: they remove what may be large.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder, removed at the end."""
        path = self._root / uuid.uuid4().hex
        # Only a sweep can have its lock, and not for long.
        handle = _lock_folder(path, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)

    @contextmanager
    def kept(self, key: str) -> Iterator[Kept]:
        """The folder of this key, as the last one left it. Raises Busy."""
        self._sweep_kept()
        path = self._root / _KEPT / key
        handle = _lock_folder(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = Kept(path)
        try:
            yield kept
        finally:
            if kept.done:
                shutil.rmtree(path, ignore_errors=True)
            os.close(handle)

    def sweep(self) -> int:
        """Remove the folders whose process is gone; how many there were."""
        removed = 0
        with suppress(FileNotFoundError):
            for path in list(self._root.iterdir()):
                if path.name != _KEPT:
                    removed += self._remove_if_abandoned(path)
        return removed

    def _sweep_kept(self) -> None:
        forgotten_s = time.time() - KEPT_FOR_S
        with suppress(FileNotFoundError):
            for path in list((self._root / _KEPT).iterdir()):
                with suppress(OSError):
                    if (path / _LOCK).stat().st_mtime < forgotten_s:
                        self._remove_if_abandoned(path)

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
            if _names(path / _LOCK, handle):
                shutil.rmtree(path, ignore_errors=True)
                return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False


def _lock_folder(path: Path, how: int) -> int:
    """Make the folder and lock it; the lock's handle. Raises Busy."""
    for _ in range(_LOCK_ATTEMPTS_MAX):
        path.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            os.close(handle)
            raise Busy(str(path)) from None
        if _names(path / _LOCK, handle):
            os.utime(handle)
            return handle
        os.close(handle)
    raise Busy(str(path))


def _names(path: Path, handle: int) -> bool:
    """Whether `path` is still the file that was opened: who held the lock before may have removed both."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
