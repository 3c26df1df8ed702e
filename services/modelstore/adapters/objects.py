"""Objects through obstore: what a folder and an object store have in common, and the folder.

obstore's blocking calls are made in threads, not its asynchronous ones: with obstore 0.12 a process that
used those aborts at its end, one time in five, because threads of the runtime below still hold Python
objects. The threads are the objects' own, so that a slow object store holds up nothing else; their number
bounds how many calls run at once, and further ones wait.

In a folder large files are not copied: a converted file on the same file system is renamed to its final
name, which is atomic. Blobs are named by their content, so a rename can replace nothing but the same bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore

from services.modelstore.core.ports import Entry, StoreError
from services.modelstore.core.refusal import NO_SPACE

CALLS_MAX = 32
READ_ONLY = 0o444
_STAGED = re.compile(r".+#\d+")
"""How obstore names a file that is not whole yet."""

T = TypeVar("T")


class StoredObjects:
    """The port `Objects` over any store of obstore, but for `adopt` and `sweep`."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(CALLS_MAX, "objects")

    async def create(self, path: str, data: bytes) -> bool:
        try:
            await self._call(obstore.put, self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    async def put(self, path: str, data: bytes) -> None:
        await self._call(obstore.put, self._store, path, data, mode="overwrite")

    async def get(self, path: str) -> bytes | None:
        try:
            return await self._call(lambda: bytes(obstore.get(self._store, path).bytes()))
        except FileNotFoundError:
            return None

    async def read(self, path: str, start: int, end: int) -> bytes:
        return await self._call(lambda: bytes(obstore.get_range(self._store, path, start=start, end=end)))

    async def size(self, path: str) -> int | None:
        try:
            return (await self._call(obstore.head, self._store, path))["size"]
        except FileNotFoundError:
            return None

    async def entries(self, prefix: str) -> list[Entry]:
        found = await self._call(lambda: obstore.list(self._store, prefix).collect())
        return [
            Entry(meta["path"], meta["size"], round(meta["last_modified"].timestamp() * 1000))
            for meta in found
        ]

    async def delete(self, path: str) -> None:
        try:
            await self._call(obstore.delete, self._store, path)
        except FileNotFoundError:
            pass

    async def _call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Raises what obstore raises for what is there or is not, StoreError for everything else."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: function(*args, **options))
        except (AlreadyExistsError, FileNotFoundError):
            raise
        except BaseError as error:
            raise store_error(error) from error
        except OSError as error:
            raise StoreError(error.errno, error.strerror) from error


def store_error(error: BaseError) -> StoreError:
    """In one line, and without what follows a `?`: some services sign requests there."""
    if NO_SPACE in str(error):
        return StoreError(errno.ENOSPC, NO_SPACE)
    first = str(error).strip().splitlines()[0]
    return StoreError(errno.EIO, re.sub(r"\?\S*", "", first))


class FolderObjects(StoredObjects):
    """Objects in one folder, which is made when it is missing. Raises OSError for a bad one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise OSError(f"the store folder {folder} cannot be written: check its owner and permissions")
        self._folder = folder.resolve()
        super().__init__(LocalStore(self._folder))

    async def adopt(self, path: str, file: str) -> None:
        if not await self._call(self._move, path, Path(file)):
            await self._call(obstore.put, self._store, path, Path(file), mode="overwrite")

    async def read(self, path: str, start: int, end: int) -> bytes:
        return await self._call(self._read, path, start, end)

    async def sweep(self, before_unix_ms: int) -> int:
        return await self._call(self._sweep, before_unix_ms)

    def _read(self, path: str, start: int, end: int) -> bytes:
        """Without obstore, which copies the bytes twice more; fewer when the file ends before `end`."""
        with (self._folder / path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

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

    def _sweep(self, before_unix_ms: int) -> int:
        removed = 0
        for folder, folders, names in os.walk(self._folder):
            # Folders with a dot are others' work, with rules of their own.
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if _STAGED.fullmatch(name)):
                # One that is whole by now has its final name.
                with suppress(FileNotFoundError):
                    if path.lstat().st_mtime * 1000 < before_unix_ms:
                        path.unlink()
                        removed += 1
        return removed


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
