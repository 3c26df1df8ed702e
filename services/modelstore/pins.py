"""Keeps blobs from garbage collection while somebody works with them, in this process or another.

Whoever relies on blobs that no manifest may name yet says so first, in an object `pins/<id>.json`; whoever
deletes blobs says which ones first, in `collections/<id>.json`, and only then reads the pins. So of two that
meet, at least one sees the other: a pin that came first spares its blobs, and who pins later waits until
the deletion is over. Both are renewed while their process lives and count for nothing some time after it
died. Times are those of the store's own listing: replicas' clocks need not agree.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from services.modelstore.core.manifest import canonical
from services.modelstore.core.ports import Entry, Objects, StoreError
from services.modelstore.core.refusal import Refused
from tokenloom.kit.logs import get_logger

PINS = "pins"
COLLECTIONS = "collections"
RENEW_S = 60.0
"""How often whoever holds a pin or collects garbage shows that it lives."""
EXPIRES_S = 15 * 60.0
"""How long a pin or a collection counts after it was renewed last."""
COLLECTION_WAIT_MAX_S = 60.0
"""How long whoever needs a blob waits for a collection that is about to delete it."""
COLLECTION_LOOK_S = 0.25

log = get_logger(__name__)


class Note:
    """One object that says "I am here, and these are my digests"."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self._folder = folder
        self.path = f"{folder}/{uuid.uuid4().hex}.json"
        self.digests: set[str] = set()

    async def write(self) -> None:
        """Make it, or renew it."""
        await self._objects.put(self.path, canonical({"digests": sorted(self.digests)}))

    async def remove(self) -> None:
        """Best effort: what stays behind expires."""
        try:
            await self._objects.delete(self.path)
        except StoreError as error:
            log.warning("note left behind", path=self.path, error=str(error))

    async def written_unix_ms(self) -> int:
        """When it was written last, by the store's clock. Raises StoreError when somebody removed it."""
        for entry in await self._objects.entries(self._folder):
            if entry.path == self.path:
                return entry.modified_unix_ms
        raise StoreError(f"{self.path} was removed while its process was at work")


class Pin(Note):
    """The blobs that one piece of work relies on."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects, PINS)

    async def add(self, digests: Iterable[str]) -> None:
        """Keep these, too. What is there when this returns stays until the pin is gone.

        Call it before looking whether blobs are there, and before writing them. Raises Refused with
        SERVICE_UNAVAILABLE when they are being deleted and that does not end.
        """
        new = set(digests) - self.digests
        if not new:
            return
        self.digests |= new
        await self.write()
        try:
            async with asyncio.timeout(COLLECTION_WAIT_MAX_S):
                await self._outlast_collections(new)
        except TimeoutError:
            message = "garbage collection is deleting files that this needs; try again"
            raise Refused("SERVICE_UNAVAILABLE", message, service="modelstore") from None

    async def _outlast_collections(self, digests: set[str]) -> None:
        while not digests.isdisjoint(await self._condemned()):
            await asyncio.sleep(COLLECTION_LOOK_S)
            await self.write()

    async def _condemned(self) -> set[str]:
        if not await self._objects.entries(COLLECTIONS):
            return set()
        return await noted(self._objects, COLLECTIONS, await self.written_unix_ms())


class Pins:
    """Makes pins."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @asynccontextmanager
    async def hold(self, digests: Iterable[str] = ()) -> AsyncIterator[Pin]:
        """A pin, renewed until the block ends. Raises as Pin.add."""
        pin = Pin(self._objects)
        renewing = asyncio.create_task(renew(pin))
        try:
            await pin.add(digests)
            yield pin
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            if pin.digests:
                await pin.remove()


async def renew(note: Note) -> None:
    """Show again and again that its process lives. One time that fails is made good by the next."""
    while True:
        await asyncio.sleep(RENEW_S)
        if note.digests:
            try:
                await note.write()
            except StoreError as error:
                log.warning("note not renewed", path=note.path, error=str(error))


async def noted(objects: Objects, folder: str, now_unix_ms: int) -> set[str]:
    """Every digest in the notes of a folder that have not expired."""
    living = [entry for entry in await objects.entries(folder) if not expired(entry, now_unix_ms)]
    found = await asyncio.gather(*(objects.get(entry.path) for entry in living))
    return {digest for data in found if data is not None for digest in _digests(data)}


def expired(entry: Entry, now_unix_ms: int) -> bool:
    """Whether a note's process has not shown itself for too long."""
    return now_unix_ms - entry.modified_unix_ms > EXPIRES_S * 1000


def _digests(data: bytes) -> list[str]:
    """A note that cannot be read names nothing: only a hand that wrote into the store makes one."""
    try:
        value: Any = json.loads(data)
        return [str(digest) for digest in value["digests"]]
    except (KeyError, TypeError, ValueError):
        log.error("note cannot be read")
        return []
