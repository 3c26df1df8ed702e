"""Sends blobs in chunks, from any offset. Lengths are checked here, digests by the receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from services.modelstore.core.manifest import blob_path
from services.modelstore.core.ports import Objects
from services.modelstore.core.refusal import Refused
from services.modelstore.core.requests import check_range
from services.modelstore.store import Store


class Blobs:
    """Reads at most `fetches_max` chunks at once."""

    def __init__(self, store: Store, objects: Objects, chunk_bytes: int, fetches_max: int) -> None:
        self._store = store
        self._objects = objects
        self._chunk_bytes = chunk_bytes
        self._reading = asyncio.Semaphore(fetches_max)

    async def fetch(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """`length` bytes from `offset` on; 0: to the end.

        Raises Refused: BLOB_NOT_FOUND, FIELD_INVALID for a range outside of the blob, DIGEST_MISMATCH
        for a blob whose size is not the one of its manifest.
        """
        path = blob_path(digest)
        size = await self._size(digest, path)
        for field, why in check_range(offset, length, size):
            raise Refused("FIELD_INVALID", f"{field}: {why}", field=field)
        end = offset + length if length else size
        while offset < end:
            until = min(offset + self._chunk_bytes, end)
            async with self._reading:
                try:
                    piece = await self._objects.read(path, offset, until)
                except FileNotFoundError:
                    raise _not_found(digest) from None
            if len(piece) != until - offset:
                raise _wrong_size(digest, size, offset + len(piece))
            yield piece
            offset = until

    async def _size(self, digest: str, path: str) -> int:
        size = await self._objects.size(path)
        if size is None:
            raise _not_found(digest)
        promised = self._store.catalogue.blob_sizes.get(digest, size)
        if promised != size:
            raise _wrong_size(digest, promised, size)
        return size


def _not_found(digest: str) -> Refused:
    return Refused("BLOB_NOT_FOUND", f"no blob {digest}; import its model again", digest=digest)


def _wrong_size(digest: str, promised: int, size: int) -> Refused:
    message = f"blob {digest} has {size} bytes, its manifest says {promised}; import its model again"
    return Refused("DIGEST_MISMATCH", message, digest=digest, actual=f"{size} bytes")
