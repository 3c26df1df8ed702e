"""Imports: read the source, convert it, store blobs, then the manifest, then the aliases.

The order is the promise: whatever kills an import, what can be resolved is whole. Equal sources give
equal versions, and a source that was converted before is not converted again.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from services.modelstore.adapters.scratch import Scratch
from services.modelstore.adapters.sources import hash_file
from services.modelstore.core import builtin
from services.modelstore.core.aliases import Target
from services.modelstore.core.catalogue import StoredVersion
from services.modelstore.core.manifest import (
    Facts,
    File,
    Manifest,
    blob_path,
    canonical,
    conversion_path,
    digest_of,
    make_manifest,
)
from services.modelstore.core.ports import ConversionJob, Converted, Converter, Objects, Progress
from services.modelstore.core.refusal import STORE_FULL, Refused
from services.modelstore.core.requests import ImportRequest
from services.modelstore.counted import counted_in_thread
from services.modelstore.inspection import Inspected, Inspector
from services.modelstore.store import Store
from tokenloom.contract.models import DEFAULT_ALIAS

VERIFY_CHUNK_BYTES = 8 * 1024 * 1024


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


@dataclass(frozen=True, slots=True)
class Imported:
    """The end of an import."""

    version: StoredVersion
    created: bool


Event = Progress | Imported


@dataclass(frozen=True, slots=True)
class _Content:
    """What a manifest needs beside its name."""

    facts: Facts
    files: tuple[File, ...]


class Importer:
    """Runs imports, a bounded number of them at once."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        inspector: Inspector,
        converter: Converter,
        scratch: Scratch,
        limits: Limits,
    ) -> None:
        self._store = store
        self._objects = objects
        self._inspector = inspector
        self._converter = converter
        self._scratch = scratch
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
            async with aclosing(self._run(request)) as events:
                async for event in events:
                    yield event
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise Refused("SERVICE_UNAVAILABLE", STORE_FULL, service="modelstore") from error
        finally:
            self._turn.release()

    async def _run(self, request: ImportRequest) -> AsyncGenerator[Event, None]:
        content: _Content | None
        provenance: Mapping[str, str]
        if request.source.startswith(builtin.PREFIX):
            content, provenance = await self._builtin(request.source), {"format": "builtin"}
        else:
            inspected = await asyncio.to_thread(self._inspector.inspect, request.source)
            recipe = ""
            async with aclosing(self._hash_source(inspected, request.dtype)) as hashing:
                async for step in hashing:
                    if isinstance(step, Progress):
                        yield step
                    else:
                        recipe = step
            content = None
            for attempt in (self._remembered(recipe), self._convert(inspected, request.dtype, recipe)):
                async with aclosing(attempt) as outcomes:
                    async for outcome in outcomes:
                        if isinstance(outcome, Progress):
                            yield outcome
                        else:
                            content = outcome
                if content is not None:
                    break
            provenance = inspected.provenance
        assert content is not None, "a conversion ends with its content or raises"
        manifest = make_manifest(request.name, content.facts, content.files, provenance)
        yield await self._publish(manifest, request)

    async def _publish(self, manifest: Manifest, request: ImportRequest) -> Imported:
        version, created = await self._store.publish(manifest, Path(request.source).name)
        model = self._store.catalogue.models[request.name]
        wanted = request.aliases or (() if model.alias(DEFAULT_ALIAS) else (DEFAULT_ALIAS,))
        targets = (Target(version.digest),)
        for alias in wanted:
            present = model.alias(alias)
            if present is None or present.targets != targets:
                await self._store.set_alias(request.name, alias, targets, None)
        return Imported(version, created)

    async def _builtin(self, source: str) -> _Content:
        if source != f"{builtin.PREFIX}sim":
            message = f"{source[:80]}: the only built-in model is {builtin.PREFIX}sim"
            raise Refused("SOURCE_NOT_FOUND", message, source=source[:80])
        files = []
        for path, data in sorted(builtin.sim_files().items()):
            file = File(path, digest_of(data), len(data))
            if await self._objects.get(blob_path(file.digest)) != data:
                await self._objects.put(blob_path(file.digest), data)
            files.append(file)
        return _Content(builtin.sim_facts(), tuple(files))

    async def _hash_source(self, inspected: Inspected, dtype: str) -> AsyncGenerator[Progress | str, None]:
        """Progress, then the digest of everything that the conversion's result depends on."""
        digests: dict[str, str] = {}

        def work(on_bytes: Callable[[int], None]) -> None:
            for file in inspected.files:
                digests[file.path] = self._inspector.sources.hash(file, on_bytes)

        total = sum(file.size_bytes for file in inspected.files)
        async with aclosing(counted_in_thread("read", total, work)) as steps:
            async for step in steps:
                yield step
        yield digest_of(
            canonical(
                {
                    "files": digests,
                    "kind": inspected.kind,
                    "options": dict(inspected.options),
                    "license": inspected.license,
                    "dtype": dtype,
                    "shard_bytes_max": self._limits.shard_bytes_max,
                    "versions": dict(self._converter.versions()),
                }
            )
        )

    async def _remembered(self, recipe: str) -> AsyncGenerator[Progress | _Content, None]:
        """An earlier conversion's result, if all of its blobs are still there and whole; else nothing."""
        data = await self._objects.get(conversion_path(recipe))
        if data is None:
            return
        try:
            value = json.loads(data)
            files = tuple(File(**file) for file in value["files"])
            content = _Content(Facts.from_json(value["facts"]), files)
        except (KeyError, TypeError, ValueError):
            return
        done, total = 0, sum(file.size_bytes for file in files)
        for file in files:
            digest = sha256()
            for start in range(0, file.size_bytes, VERIFY_CHUNK_BYTES):
                yield Progress("hash", done + start, total)
                end = min(start + VERIFY_CHUNK_BYTES, file.size_bytes)
                piece = await self._piece(file, start, end)
                await asyncio.to_thread(digest.update, piece)
            if f"sha256:{digest.hexdigest()}" != file.digest:
                return
            done += file.size_bytes
        yield Progress("hash", done, total)
        yield content

    async def _piece(self, file: File, start: int, end: int) -> bytes:
        """Part of a stored blob; empty when there is none."""
        path = blob_path(file.digest)
        if await self._objects.size(path) != file.size_bytes:
            return b""
        return await self._objects.read(path, start, end)

    async def _convert(
        self, inspected: Inspected, dtype: str, recipe: str
    ) -> AsyncGenerator[Progress | _Content, None]:
        with self._scratch.folder() as folder:
            source, output = folder / "source", folder / "output"
            output.mkdir()
            await asyncio.to_thread(self._inspector.stage, inspected, source)
            job = self._job(inspected, dtype, source, output)
            converted: Converted | None = None
            async with aclosing(self._converter.convert(job)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        yield event
                    else:
                        converted = event
            await asyncio.to_thread(self._inspector.check_unchanged, inspected)
            assert converted is not None, "a converter ends with its result or raises"
            async with aclosing(self._keep(output, converted, recipe)) as keeping:
                async for step in keeping:
                    yield step

    def _job(self, inspected: Inspected, dtype: str, source: Path, output: Path) -> ConversionJob:
        return ConversionJob(
            kind=inspected.kind,
            label=inspected.label,
            source=str(source),
            output_dir=str(output),
            dtype=dtype,
            shard_bytes_max=self._limits.shard_bytes_max,
            threads=self._limits.convert_threads,
            license=inspected.license,
            options=inspected.options,
        )

    async def _keep(
        self, output: Path, converted: Converted, recipe: str
    ) -> AsyncGenerator[Progress | _Content, None]:
        """Name the converter's files by their digests and move them into the store."""
        sizes = {name: (output / name).stat().st_size for name in sorted(converted.files)}
        total = sum(sizes.values())
        files: list[File] = []

        def work(on_bytes: Callable[[int], None]) -> None:
            for name, size in sizes.items():
                files.append(File(name, hash_file(output / name, on_bytes), size))

        async with aclosing(counted_in_thread("hash", total, work)) as steps:
            async for step in steps:
                yield step
        done = 0
        for file in files:
            # Over what may be there already: if that is damaged, this mends it.
            await self._objects.adopt(blob_path(file.digest), str(output / file.path))
            done += file.size_bytes
            yield Progress("store", done, total)
        content = _Content(Facts.from_json(converted.facts), tuple(files))
        record = {"facts": content.facts.to_json(), "files": [_file_json(f) for f in files]}
        await self._objects.put(conversion_path(recipe), canonical(record))
        yield content


def _file_json(file: File) -> dict[str, object]:
    return {"path": file.path, "digest": file.digest, "size_bytes": file.size_bytes}
