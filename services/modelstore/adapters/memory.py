"""Objects in a dictionary: the fake beside its port, with the same promises as a folder's."""

from __future__ import annotations

import asyncio
from pathlib import Path


class MemoryObjects:
    """The port `Objects`. Every call gives other tasks a turn, as real ones do."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    async def create(self, path: str, data: bytes) -> bool:
        await asyncio.sleep(0)
        return self.data.setdefault(path, data) is data

    async def put(self, path: str, data: bytes) -> None:
        await asyncio.sleep(0)
        self.data[path] = data

    async def adopt(self, path: str, file: str) -> None:
        self.data[path] = await asyncio.to_thread(Path(file).read_bytes)

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

    async def names(self, prefix: str) -> list[str]:
        await asyncio.sleep(0)
        return [path for path in self.data if path.startswith(f"{prefix}/")]

    async def delete(self, path: str) -> None:
        await asyncio.sleep(0)
        self.data.pop(path, None)
