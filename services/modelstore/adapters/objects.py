"""Objects in a folder, through obstore's blocking calls in threads.

Not through its asynchronous ones: with obstore 0.12 a process that used them aborts at its end, one time
in five, because threads of the runtime below still hold Python objects.

Large files are not copied: a converted file on the same file system is renamed to its final name, which
is atomic. Blobs are named by their content, so a rename can replace nothing but the same bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from services.modelstore.core.refusal import NO_SPACE

READ_ONLY = 0o444


class FolderObjects:
    """The port `Objects` over one folder, which is made when it is missing. Raises OSError for a bad one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise OSError(f"the store folder {folder} cannot be written: check its owner and permissions")
        self._folder = folder.resolve()
        self._store = LocalStore(self._folder)

    async def create(self, path: str, data: bytes) -> bool:
        try:
            with _naming_full_disks():
                await asyncio.to_thread(obstore.put, self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    async def put(self, path: str, data: bytes) -> None:
        with _naming_full_disks():
            await asyncio.to_thread(obstore.put, self._store, path, data, mode="overwrite")

    async def adopt(self, path: str, file: str) -> None:
        if not await asyncio.to_thread(self._move, path, Path(file)):
            with _naming_full_disks():
                await asyncio.to_thread(obstore.put, self._store, path, Path(file), mode="overwrite")

    async def get(self, path: str) -> bytes | None:
        try:
            return await asyncio.to_thread(lambda: bytes(obstore.get(self._store, path).bytes()))
        except FileNotFoundError:
            return None

    async def read(self, path: str, start: int, end: int) -> bytes:
        read = await asyncio.to_thread(obstore.get_range, self._store, path, start=start, end=end)
        return bytes(read)

    async def size(self, path: str) -> int | None:
        try:
            return (await asyncio.to_thread(obstore.head, self._store, path))["size"]
        except FileNotFoundError:
            return None

    async def names(self, prefix: str) -> list[str]:
        found = await asyncio.to_thread(lambda: obstore.list(self._store, prefix).collect())
        return [meta["path"] for meta in found]

    async def delete(self, path: str) -> None:
        try:
            await asyncio.to_thread(obstore.delete, self._store, path)
        except FileNotFoundError:
            pass

    def _move(self, path: str, file: Path) -> bool:
        """False when the folder is on another file system."""
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(READ_ONLY)
        # The manifest that names these bytes is written next: they must not come after it on the disk.
        _sync(file)
        try:
            file.replace(target)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise
        _sync(target.parent)
        return True


@contextmanager
def _naming_full_disks() -> Iterator[None]:
    """obstore has no kind of its own for a full disk; give it the system's."""
    try:
        yield
    except BaseError as error:
        if NO_SPACE in str(error):
            raise OSError(errno.ENOSPC, NO_SPACE) from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
