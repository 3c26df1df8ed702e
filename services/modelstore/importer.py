"""Imports: bring the source here, convert it, store blobs, then the manifest, then the aliases.

The order is the promise: whatever kills an import, what can be resolved is whole. Equal sources give
equal versions, and a source that was converted before is not converted again.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from services.modelstore.adapters.scratch import Scratch
from services.modelstore.adapters.sources import LocalSources
from services.modelstore.adapters.threads import entered
from services.modelstore.conversions import Content, Conversions, folder_with_digest
from services.modelstore.core import builtin
from services.modelstore.core.aliases import Target
from services.modelstore.core.catalogue import StoredVersion
from services.modelstore.core.manifest import File, Manifest, blob_path, digest_of, make_manifest
from services.modelstore.core.ports import Converter, Objects, Progress
from services.modelstore.core.refusal import STORE_FULL, Refused
from services.modelstore.core.requests import ImportRequest
from services.modelstore.core.urls import Url, is_url, parse_source
from services.modelstore.core.web import DOWNLOAD_BYTES_MAX
from services.modelstore.counted import Pace
from services.modelstore.downloading import Downloaded, Downloader
from services.modelstore.inspection import Inspected, Inspector
from services.modelstore.pins import Pin, Pins
from services.modelstore.store import Store
from tokenloom.contract.models import DEFAULT_ALIAS


@dataclass(frozen=True, slots=True)
class Limits:
    """What an import may use."""

    shard_bytes_max: int = 2 * 1024**3
    convert_threads: int = 0
    """CPU threads of a conversion; 0: as many as torch likes."""
    imports_max: int = 1
    """Imports that run at once."""
    imports_waiting_max: int = 16
    """Imports that may wait for their turn."""
    download_bytes_max: int = DOWNLOAD_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Imported:
    """The end of an import."""

    version: StoredVersion
    created: bool


Event = Progress | Imported


@dataclass(frozen=True, slots=True)
class _Made:
    """A manifest whose blobs are all stored, and where it came from, for people."""

    manifest: Manifest
    source: str


class Importer:
    """Runs imports, a bounded number of them at once."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        inspector: Inspector,
        converter: Converter,
        scratch: Scratch,
        downloader: Downloader,
        limits: Limits,
    ) -> None:
        self._store = store
        self._objects = objects
        self._inspector = inspector
        self._downloader = downloader
        self._pins = Pins(objects)
        self._conversions = Conversions(
            objects, inspector, converter, scratch, limits.shard_bytes_max, limits.convert_threads
        )
        self._limits = limits
        self._turn = asyncio.Semaphore(limits.imports_max)
        self._waiting = 0

    async def run(self, request: ImportRequest) -> AsyncGenerator[Event, None]:
        """Progress, then one Imported. Raises Refused; closing the generator stops the import."""
        if self._waiting >= self._limits.imports_waiting_max:
            limit = str(self._limits.imports_waiting_max)
            message = f"{limit} imports wait already; try again when one has ended"
            raise Refused("QUEUE_FULL", message, queue="imports", limit=limit)
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            pace = Pace()
            async with aclosing(self._run(request)) as events:
                async for event in events:
                    if isinstance(event, Imported) or pace.lets(event):
                        yield event
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise Refused("SERVICE_UNAVAILABLE", STORE_FULL, service="modelstore") from error
        finally:
            self._turn.release()

    async def _run(self, request: ImportRequest) -> AsyncGenerator[Event, None]:
        imported: Imported | None = None
        async with self._pins.hold() as pin, aclosing(self._steps(request, pin)) as steps:
            async for step in steps:
                if isinstance(step, Progress):
                    yield step
                else:
                    # Before the steps end: with them goes what was downloaded, which a repetition would need.
                    imported = await self._publish(step.manifest, request, step.source)
        assert imported is not None, "an import ends with its version or raises"
        yield imported

    def _steps(self, request: ImportRequest, pin: Pin) -> AsyncGenerator[Progress | _Made, None]:
        if request.source.startswith(builtin.PREFIX):
            return self._builtin(request, pin)
        if is_url(request.source):
            return self._from_url(request, parse_source(request.source), pin)
        return self._from_path(request, pin)

    async def _from_path(self, request: ImportRequest, pin: Pin) -> AsyncGenerator[Progress | _Made, None]:
        inspected = await asyncio.to_thread(self._inspector.inspect, request.source)
        async with aclosing(self._converted(request, inspected, Path(request.source).name, pin)) as steps:
            async for step in steps:
                yield step

    async def _from_url(
        self, request: ImportRequest, url: Url, pin: Pin
    ) -> AsyncGenerator[Progress | _Made, None]:
        """What was downloaded stays until the version is published, or until it turns out to be no model."""
        if request.source_digest and url.is_folder:
            raise folder_with_digest()
        async with entered(self._downloader.kept(url)) as kept:
            downloaded: Downloaded | None = None
            async with aclosing(self._downloader.run(url, kept.path)) as steps:
                async for step in steps:
                    if isinstance(step, Progress):
                        yield step
                    else:
                        downloaded = step
            assert downloaded is not None, "a download ends with its files or raises"
            inspected = await asyncio.to_thread(
                self._inspector.inspect_fetched,
                LocalSources([kept.path]),
                downloaded.path,
                downloaded.label,
            )
            async with aclosing(self._converted(request, inspected, url.shown, pin)) as converting:
                async for made in converting:
                    yield made

    async def _converted(
        self, request: ImportRequest, inspected: Inspected, source: str, pin: Pin
    ) -> AsyncGenerator[Progress | _Made, None]:
        running = self._conversions.run(inspected, request.dtype, request.source_digest, pin)
        async with aclosing(running) as steps:
            async for step in steps:
                if isinstance(step, Content):
                    manifest = make_manifest(request.name, step.facts, step.files, inspected.provenance)
                    yield _Made(manifest, source)
                else:
                    yield step

    async def _publish(self, manifest: Manifest, request: ImportRequest, source: str) -> Imported:
        version, created = await self._store.publish(manifest, source)
        model = self._store.catalogue.models[request.name]
        wanted = request.aliases or (() if model.alias(DEFAULT_ALIAS) else (DEFAULT_ALIAS,))
        targets = (Target(version.digest),)
        for alias in wanted:
            present = model.alias(alias)
            if present is None or present.targets != targets:
                await self._store.set_alias(request.name, alias, targets, None)
        return Imported(version, created)

    async def _builtin(self, request: ImportRequest, pin: Pin) -> AsyncGenerator[Progress | _Made, None]:
        source = request.source
        if source != f"{builtin.PREFIX}sim":
            message = f"{source[:80]}: the only built-in model is {builtin.PREFIX}sim"
            raise Refused("SOURCE_NOT_FOUND", message, source=source[:80])
        found = dict(sorted(builtin.sim_files().items()))
        files = [File(path, digest_of(data), len(data)) for path, data in found.items()]
        await pin.add(file.digest for file in files)
        for file in files:
            if await self._objects.get(blob_path(file.digest)) != found[file.path]:
                await self._objects.put(blob_path(file.digest), found[file.path])
        yield _Made(make_manifest(request.name, builtin.sim_facts(), files, {"format": "builtin"}), source)
