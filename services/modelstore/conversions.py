"""From a checked source to blobs and facts: hash it, remember what it became before, or convert it.

Blobs are stored before the record that remembers them, so a record that is found is worth following. It
holds its own digest, and its blobs are read before they are believed: what is damaged is converted again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from services.modelstore.adapters.scratch import Scratch
from services.modelstore.adapters.sources import hash_file
from services.modelstore.adapters.threads import entered, in_thread
from services.modelstore.core.manifest import (
    Facts,
    File,
    blob_path,
    canonical,
    conversion_path,
    digest_of,
)
from services.modelstore.core.ports import ConversionJob, Converted, Converter, Objects, Progress
from services.modelstore.core.refusal import Refused
from services.modelstore.counted import counted_in_thread
from services.modelstore.inspection import Inspected, Inspector
from services.modelstore.pins import Pin

VERIFY_CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Content:
    """What a manifest needs beside its name."""

    facts: Facts
    files: tuple[File, ...]


class Conversions:
    """`threads` and `shard_bytes_max` as in the importer's Limits."""

    def __init__(
        self,
        objects: Objects,
        inspector: Inspector,
        converter: Converter,
        scratch: Scratch,
        shard_bytes_max: int,
        threads: int,
    ) -> None:
        self._objects = objects
        self._inspector = inspector
        self._converter = converter
        self._scratch = scratch
        self._shard_bytes_max = shard_bytes_max
        self._threads = threads

    async def run(
        self, inspected: Inspected, dtype: str, source_digest: str, pin: Pin
    ) -> AsyncGenerator[Progress | Content, None]:
        """Progress, then one Content whose blobs are all stored and pinned.

        Raises Refused: also DIGEST_MISMATCH, when the source is one file and has not this digest.
        """
        if source_digest and not inspected.is_file:
            raise folder_with_digest()
        # Also where nothing will be converted: who was killed may have come as far as the record.
        await in_thread(self._scratch.sweep)
        recipe = ""
        async with aclosing(self._hash_source(inspected, dtype, source_digest)) as hashing:
            async for step in hashing:
                if isinstance(step, Progress):
                    yield step
                else:
                    recipe = step
        for attempt in (self._remembered(recipe, pin), self._convert(inspected, dtype, recipe, pin)):
            async with aclosing(attempt) as outcomes:
                async for outcome in outcomes:
                    yield outcome
                    if isinstance(outcome, Content):
                        return

    async def _hash_source(
        self, inspected: Inspected, dtype: str, source_digest: str
    ) -> AsyncGenerator[Progress | str, None]:
        """Progress, then the digest of everything that the conversion's result depends on."""
        digests: dict[str, str] = {}

        def work(on_bytes: Callable[[int], None]) -> None:
            for file in inspected.files:
                digests[inspected.staged(file)] = self._inspector.sources.hash(file, on_bytes)

        total = sum(file.size_bytes for file in inspected.files)
        async with aclosing(counted_in_thread("read", total, work)) as steps:
            async for step in steps:
                yield step
        if source_digest:
            _check_digest(inspected, digests, source_digest)
        yield digest_of(
            canonical(
                {
                    "files": digests,
                    "kind": inspected.kind,
                    "options": dict(inspected.options),
                    "license": inspected.license,
                    "dtype": dtype,
                    "shard_bytes_max": self._shard_bytes_max,
                    "versions": dict(self._converter.versions()),
                }
            )
        )

    async def _remembered(self, recipe: str, pin: Pin) -> AsyncGenerator[Progress | Content, None]:
        """An earlier conversion's result, if all of its blobs are still there and whole; else nothing."""
        content = _recorded(await self._objects.get(conversion_path(recipe)))
        if content is None:
            return
        files = content.files
        await pin.add(file.digest for file in files)
        whole: set[str] = set()
        done, total = 0, sum(file.size_bytes for file in files)
        for file in files:
            async with aclosing(self._read_stored(file, whole)) as reading:
                async for read in reading:
                    yield Progress("hash", done + read, total)
            if file.digest not in whole:
                return
            done += file.size_bytes
        yield content

    async def _read_stored(self, file: File, whole: set[str]) -> AsyncGenerator[int, None]:
        """How far a blob was read; `whole` has its digest afterwards if it is there and undamaged."""
        path, digest = blob_path(file.digest), sha256()
        if await self._objects.size(path) != file.size_bytes:
            return
        for start in range(0, file.size_bytes, VERIFY_CHUNK_BYTES):
            end = min(start + VERIFY_CHUNK_BYTES, file.size_bytes)
            try:
                piece = await self._objects.read(path, start, end)
            except FileNotFoundError:
                return
            await asyncio.to_thread(digest.update, piece)
            yield end
        if f"sha256:{digest.hexdigest()}" == file.digest:
            whole.add(file.digest)

    async def _convert(
        self, inspected: Inspected, dtype: str, recipe: str, pin: Pin
    ) -> AsyncGenerator[Progress | Content, None]:
        async with entered(self._scratch.folder()) as folder:
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
            async with aclosing(self._keep(output, converted, recipe, pin)) as keeping:
                async for step in keeping:
                    yield step

    def _job(self, inspected: Inspected, dtype: str, source: Path, output: Path) -> ConversionJob:
        return ConversionJob(
            kind=inspected.kind,
            label=inspected.label,
            source=str(source),
            output_dir=str(output),
            dtype=dtype,
            shard_bytes_max=self._shard_bytes_max,
            threads=self._threads,
            license=inspected.license,
            options=inspected.options,
        )

    async def _keep(
        self, output: Path, converted: Converted, recipe: str, pin: Pin
    ) -> AsyncGenerator[Progress | Content, None]:
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
        await pin.add(file.digest for file in files)
        done, whole = 0, set[str]()
        for file in files:
            async with aclosing(self._read_stored(file, whole)) as reading:
                async for read in reading:
                    yield Progress("store", done + read, total)
            # What is there already is not written again, unless it is damaged: then this mends it.
            if file.digest not in whole:
                await self._objects.adopt(blob_path(file.digest), str(output / file.path))
            done += file.size_bytes
            yield Progress("store", done, total)
        content = Content(Facts.from_json(converted.facts), tuple(files))
        await self._objects.put(conversion_path(recipe), _record(content))
        yield content


def folder_with_digest() -> Refused:
    """A folder has no digest that its source could be held against."""
    message = "source_digest: is for a source that is one file, and this one is a folder; leave it out"
    return Refused("FIELD_INVALID", message, field="source_digest")


def _check_digest(inspected: Inspected, digests: Mapping[str, str], wanted: str) -> None:
    actual = next(iter(digests.values()))
    if actual != wanted:
        message = f"{inspected.label}: has digest {actual}, not {wanted}; it is another file, or damaged"
        raise Refused("DIGEST_MISMATCH", message, digest=wanted, actual=actual)


def _record(content: Content) -> bytes:
    value = {"facts": content.facts.to_json(), "files": [asdict(file) for file in content.files]}
    return canonical({**value, "digest": digest_of(canonical(value))})


def _recorded(data: bytes | None) -> Content | None:
    """What `_record` wrote; None for what is missing, damaged, or from before records had a digest."""
    try:
        value = json.loads(data or b"")
        if value.pop("digest") != digest_of(canonical(value)):
            return None
        files = tuple(File(**file) for file in value["files"])
        return Content(Facts.from_json(value["facts"]), files)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
