"""Objects in a dictionary: the fake beside its port, with the same promises as a folder's."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.modelstore.core.ports import Entry


class MemoryObjects:
    """The port `Objects`. Every call gives other tasks a turn, as real ones do."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.modified: dict[str, int] = {}
        self.unix_ms = 0
        """The place's own clock, moved by hand."""

    async def create(self, path: str, data: bytes) -> bool:
        await asyncio.sleep(0)
        if path in self.data:
            return False
        self._set(path, data)
        return True

    async def put(self, path: str, data: bytes) -> None:
        await asyncio.sleep(0)
        self._set(path, data)

    async def adopt(self, path: str, file: str) -> None:
        self._set(path, await asyncio.to_thread(Path(file).read_bytes))

    async def get(self, path: str) -> bytes | None:
        await asyncio.sleep(0)
        return self.data.get(path)

    async def read(self, path: str, start: int, end: int) -> bytes:
        await asyncio.sleep(0)
        if path not in self.data:
            raise FileNotFoundError(path)
        return self.data[path][start:end]

    async def size(self, path: str) -> int | None:
        await asyncio.sleep(0)
        return len(self.data[path]) if path in self.data else None

    async def entries(self, prefix: str) -> list[Entry]:
        await asyncio.sleep(0)
        return [
            Entry(path, len(data), self.modified.get(path, 0))
            for path, data in self.data.items()
            if path.startswith(f"{prefix}/")
        ]

    async def delete(self, path: str) -> None:
        await asyncio.sleep(0)
        self.data.pop(path, None)

    async def sweep(self, before_unix_ms: int) -> int:
        await asyncio.sleep(0)
        return 0

    def _set(self, path: str, data: bytes) -> None:
        self.data[path] = data
        self.modified[path] = self.unix_ms
