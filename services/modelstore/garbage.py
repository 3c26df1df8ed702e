"""Deletes blobs that no version names. How it stays clear of running imports is said in `pins.py`.

A blob is deleted when, after this collection has announced it, no pin and no manifest names it, not even
one that this version cannot read, and it is old enough.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.modelstore.core.manifest import File, blob_in_path, blob_path
from services.modelstore.core.ports import Entry, Objects, StoreError
from services.modelstore.pins import COLLECTIONS, EXPIRES_S, PINS, RENEW_S, Note, expired, noted, renew
from services.modelstore.store import Store
from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

ANNOUNCED_MAX = 10_000
"""Blobs that are announced and deleted at a time; more of them are several times."""
DELETES_AT_ONCE_MAX = 32

log = get_logger(__name__)


@dataclass
class Collected:
    """What a collection did, or would have done."""

    deleted: list[File] = field(default_factory=list)
    kept_blobs: int = 0
    kept_bytes: int = 0
    spared_blobs: int = 0
    """Not named by any version, but pinned or too young."""


@dataclass(frozen=True, slots=True)
class _Judgement:
    kept: Sequence[Entry]
    spared: Sequence[Entry]
    garbage: Sequence[Entry]


class Collector:
    """One collection at a time; further ones wait. `sweep_scratch` removes what dead imports left."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        clock: Clock,
        sweep_scratch: Callable[[], int],
        min_age_s: float,
    ) -> None:
        self._store = store
        self._objects = objects
        self._clock = clock
        self._sweep_scratch = sweep_scratch
        self._min_age_ms = round(min_age_s * 1000)
        self._turn = asyncio.Lock()

    async def run(self, dry_run: bool, min_age_ms: int) -> Collected:
        """`min_age_ms` 0: the setting. Raises StoreError; what was deleted until then stays so."""
        async with self._turn:
            found = await self._objects.entries("blobs")
            blobs = [entry for entry in found if blob_in_path(entry.path)]
            now_unix_ms = self._clock.unix_ms() if dry_run else await self._store_unix_ms()
            first = await self._judge(blobs, now_unix_ms, min_age_ms or self._min_age_ms)
            done = Collected(spared_blobs=len(first.spared))
            _keep(done, first.kept)
            if dry_run:
                done.deleted = [_file(entry) for entry in first.garbage]
                return done
            for start in range(0, len(first.garbage), ANNOUNCED_MAX):
                announced = first.garbage[start : start + ANNOUNCED_MAX]
                await self._delete(announced, min_age_ms or self._min_age_ms, done)
            await self._tidy(now_unix_ms)
        size = sum(file.size_bytes for file in done.deleted)
        log.info("garbage collected", blobs=len(done.deleted), bytes=size, spared=done.spared_blobs)
        return done

    async def _judge(self, blobs: Sequence[Entry], now_unix_ms: int, min_age_ms: int) -> _Judgement:
        # In this order: an import that ends in between has left its pin before or its manifest after.
        pinned = await noted(self._objects, PINS, now_unix_ms)
        named = await self._store.named_blobs()
        kept, spared, garbage = [], [], []
        for entry in blobs:
            digest = blob_in_path(entry.path)
            if digest in named:
                kept.append(entry)
            elif digest in pinned or now_unix_ms - entry.modified_unix_ms < min_age_ms:
                spared.append(entry)
            else:
                garbage.append(entry)
        return _Judgement(kept, spared, garbage)

    async def _delete(self, announced: Sequence[Entry], min_age_ms: int, done: Collected) -> None:
        async with self._announcement(announced) as announcement:
            now_unix_ms = await announcement.written_unix_ms()
            again = await self._judge(announced, now_unix_ms, min_age_ms)
            _keep(done, again.kept)
            done.spared_blobs += len(again.spared)
            for start in range(0, len(again.garbage), DELETES_AT_ONCE_MAX):
                some = again.garbage[start : start + DELETES_AT_ONCE_MAX]
                announcement.check_alive(self._clock)
                await asyncio.gather(*(self._objects.delete(entry.path) for entry in some))
                done.deleted += [_file(entry) for entry in some]

    @asynccontextmanager
    async def _announcement(self, blobs: Sequence[Entry]) -> AsyncIterator[_Announcement]:
        announcement = _Announcement(self._objects, self._clock)
        announcement.digests = {digest for blob in blobs if (digest := blob_in_path(blob.path))}
        await announcement.write()
        renewing = asyncio.create_task(renew(announcement))
        try:
            yield announcement
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await announcement.remove()

    async def _store_unix_ms(self) -> int:
        """The time by the clock that ages are measured with."""
        async with self._announcement(()) as announcement:
            return await announcement.written_unix_ms()

    async def _tidy(self, now_unix_ms: int) -> None:
        """Remove what leads nowhere: records of conversions, notes of the dead, half-written files."""
        records = await self._objects.entries("conversions")
        useless = [entry for entry in records if await self._leads_nowhere(entry)]
        notes = [*await self._objects.entries(PINS), *await self._objects.entries(COLLECTIONS)]
        dead = [entry for entry in notes if expired(entry, now_unix_ms)]
        for entry in (*useless, *dead):
            await self._objects.delete(entry.path)
        leftovers = await self._objects.sweep(now_unix_ms - self._min_age_ms)
        folders = await asyncio.to_thread(self._sweep_scratch)
        log.info("store tidied", conversions=len(useless), notes=len(dead), files=leftovers, folders=folders)

    async def _leads_nowhere(self, record: Entry) -> bool:
        """Whether a conversion's result is no longer here. Without its record it is made anew."""
        data = await self._objects.get(record.path)
        if data is None:
            return False
        try:
            digests = [str(file["digest"]) for file in json.loads(data)["files"]]
            sizes = [await self._objects.size(blob_path(digest)) for digest in digests]
        except (KeyError, TypeError, ValueError):
            return True
        return None in sizes


class _Announcement(Note):
    """What a collection is about to delete."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        super().__init__(objects, COLLECTIONS)
        self._clock = clock
        self._renewed_s = clock.monotonic()

    async def write(self) -> None:
        began_s = self._clock.monotonic()
        await super().write()
        self._renewed_s = began_s

    def check_alive(self, clock: Clock) -> None:
        """Raises StoreError when others may soon take this collection for dead."""
        if clock.monotonic() - self._renewed_s > EXPIRES_S - 2 * RENEW_S:
            raise StoreError("the collection was held up for too long; run it again")


def _keep(done: Collected, entries: Sequence[Entry]) -> None:
    done.kept_blobs += len(entries)
    done.kept_bytes += sum(entry.size_bytes for entry in entries)


def _file(entry: Entry) -> File:
    return File(entry.path, blob_in_path(entry.path) or "", entry.size_bytes)
