"""Versions of random bytes, and a source of them that breaks as it is told."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from services.worker.front.ports import FileRef, ModelVersion
from tokenloom.kit.errors import CallError

CHUNK_BYTES = 1000


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def data_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def version_of(name: str, *blobs: bytes) -> ModelVersion:
    files = tuple(FileRef(f"{i}.bin", digest_of(data), len(data)) for i, data in enumerate(blobs))
    return ModelVersion(digest_of(name.encode()), name, 128, 512, files=files)


def broken(reason: str = "SERVICE_UNAVAILABLE") -> CallError:
    return CallError(reason, "broken off", metadata={"service": "modelstore"})


@dataclass
class Source:
    """Blobs by digest. `fault` may spoil each answer of a call: bytes in place of those, or an error."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[bytes], bytes | CallError] = lambda data: data
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    sent: int = 0
    active: int = 0
    active_max: int = 0

    @classmethod
    def of(cls, *blobs: bytes) -> Source:
        return cls({digest_of(data): data for data in blobs})

    async def fetch(self, digest: str, offset: int, length: int) -> AsyncGenerator[memoryview, None]:
        self.asked.append((digest, offset, length))
        self.active += 1
        self.active_max = max(self.active_max, self.active)
        try:
            if digest not in self.blobs:
                raise CallError("BLOB_NOT_FOUND", "no such blob", metadata={"digest": digest})
            data = self.blobs[digest][offset : offset + length]
            for start in range(0, len(data), CHUNK_BYTES):
                piece = self.fault(data[start : start + CHUNK_BYTES])
                if isinstance(piece, CallError):
                    raise piece
                self.sent += len(piece)
                yield memoryview(piece)
                if len(piece) < len(data[start : start + CHUNK_BYTES]):
                    return
        finally:
            self.active -= 1
