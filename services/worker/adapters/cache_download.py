"""Brings one blob here: ranges of it at once, hashed behind its front while they come.

Bounds: `streams_max` ranges at once over all blobs; `attempts_max` tries in a row that bring no new byte of
a range, or wrong bytes of the whole; CHUNK_SILENCE_MAX_S for a stream that says nothing. A wrong digest
throws everything away, because nobody knows which of the bytes are wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from services.worker.adapters.blobfile import Blob
from services.worker.adapters.cache_part import PartFile
from services.worker.adapters.cache_streams import Streams
from services.worker.adapters.cache_threads import Threads
from services.worker.front.ports import FileRef
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

RANGE_BYTES_MAX = 32 * 1024 * 1024
"""One stream's share: so far do the streams of one blob run ahead of its hash."""
RANGE_BYTES_MIN = 1024 * 1024
"""Less is not worth a stream of its own."""
HASH_STEP_BYTES = 4 * 1024 * 1024
"""Hashed at once while a blob grows."""
HASH_SLICE_BYTES = 64 * 1024 * 1024
"""Hashed by one call in a thread, which cannot be interrupted."""
FLUSH_BYTES = 64 * 1024 * 1024
"""Sent to the disk together while a blob grows."""
RETRY_PAUSE_S = 0.2
RETRY_PAUSE_MAX_S = 5.0
CHUNK_SILENCE_MAX_S = 60.0
"""A stream of bytes that is silent for so long is given up, and resumed."""

log = get_logger(__name__)

Came = Callable[[int], None]
"""Hears how many bytes came; of less than zero, how many were thrown away."""


class BlobSource(Protocol):
    """Where missing bytes come from."""

    def fetch(self, digest: str, offset: int, length: int) -> AsyncGenerator[memoryview, None]:
        """`length` bytes of a blob from `offset` on. Raises CallError."""
        ...


class Downloads:
    """Fetches blobs from one source."""

    def __init__(self, source: BlobSource, threads: Threads, *, streams_max: int, attempts_max: int) -> None:
        self._source = source
        self._threads = threads
        self._streams = Streams(streams_max)
        self._attempts_max = attempts_max

    async def fetch(self, file: FileRef, blob: Blob, came: Came) -> None:
        """Bring it here, whole and right, and remember that it is. Its lock must be held.

        Raises CallError, or OSError for a disk that does not take it.
        """
        tries = 0
        while True:
            part = PartFile(blob, file.size_bytes)
            try:
                came(await self._threads.run(part.open))
                wrong = await self._try(file, part, came)
                if wrong is None:
                    await self._threads.run(part.finish)
                    await self._threads.run(blob.remember)
                    return
                came(-part.total)
                await self._threads.run(blob.discard)
            finally:
                await self._threads.run(part.close)
            tries += 1
            if tries >= self._attempts_max:
                raise wrong
            log.warning("fetching a blob anew", file=file.path, digest=file.digest, why=wrong.message)
            await asyncio.sleep(pause_s(tries))

    async def _try(self, file: FileRef, part: PartFile, came: Came) -> CallError | None:
        """Fetch what is missing. None when the blob is whole and right, else in how far it is wrong."""
        attempt = _Attempt(self._source, self._threads, self._streams, self._attempts_max, file, part, came)
        try:
            await attempt.run()
        except BaseExceptionGroup as errors:
            first = _first(errors)
            if isinstance(first, CallError) and first.reason == "DIGEST_MISMATCH":
                return first
            raise first from None
        actual = part.digest()
        if actual == file.digest:
            return None
        why = f"{file.path}: the bytes that came have digest {actual}, not {file.digest}"
        return CallError("DIGEST_MISMATCH", why, metadata={"digest": file.digest, "actual": actual})


@dataclass(slots=True)
class _Piece:
    """What is still missing of one range."""

    at: int
    end: int


class _Attempt:
    """Everything that is missing of one blob, fetched and hashed once."""

    def __init__(
        self,
        source: BlobSource,
        threads: Threads,
        streams: Streams,
        attempts_max: int,
        file: FileRef,
        part: PartFile,
        came: Came,
    ) -> None:
        self._source = source
        self._threads = threads
        self._streams = streams
        self._attempts_max = attempts_max
        self._file = file
        self._part = part
        self._came = came
        self._grown = asyncio.Event()
        self._writing = asyncio.Lock()
        """The kernel lets one writer at a time into a file, and has the others spin."""
        gaps = part.gaps(range_bytes(file.size_bytes, streams.max))
        self._pieces = iter([_Piece(start, end) for start, end in gaps])

    async def run(self) -> None:
        """Raises a group of the errors that ended it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name=f"hash {self._file.path}")
            for _ in range(self._streams.max):
                group.create_task(self._fetch(), name=f"fetch {self._file.path}")

    async def _follow(self) -> None:
        """Hash behind the front until all is hashed."""
        part, size = self._part, self._file.size_bytes
        flushed = part.total
        while part.hashed < size:
            front = part.front
            if front < size and front - part.hashed < HASH_STEP_BYTES:
                self._grown.clear()
                await self._grown.wait()
                continue
            await self._threads.run(part.hash_to, min(front, part.hashed + HASH_SLICE_BYTES))
            if (total := part.total) - flushed >= FLUSH_BYTES:
                flushed = total
                await self._threads.run(part.flush)

    async def _fetch(self) -> None:
        """Piece by piece, as long as there are any; several of these run at once."""
        for piece in self._pieces:
            tries = 0
            while piece.at < piece.end:
                began = piece.at
                failure = await self._stream(piece)
                if failure is None:
                    continue
                tries = 1 if piece.at > began else tries + 1
                if tries >= self._attempts_max:
                    raise failure
                log.warning("fetching on", file=self._file.path, offset=piece.at, why=failure.message)
                await asyncio.sleep(pause_s(tries))

    async def _stream(self, piece: _Piece) -> CallError | None:
        """One FetchBlob. None at its end, or why it broke; raises what another one would not mend."""
        file = self._file
        try:
            async with (
                self._streams.one(file.digest),
                aclosing(self._source.fetch(file.digest, piece.at, piece.end - piece.at)) as chunks,
            ):
                while (data := await _next_within(chunks, CHUNK_SILENCE_MAX_S)) is not None:
                    await self._keep(piece, data)
        except CallError as error:
            if error.retriable:
                return error
            if error.reason == "DIGEST_MISMATCH":
                raise
            raise load_failed(file, error.message) from error
        if piece.at < piece.end:
            return CallError("SERVICE_UNAVAILABLE", f"{file.path}: the stream ended early")
        return None

    async def _keep(self, piece: _Piece, data: memoryview) -> None:
        count = len(data)
        if count > piece.end - piece.at:
            why = f"{self._file.path}: more bytes came than were asked for, up to byte {piece.end}"
            about = {"digest": self._file.digest, "actual": f"more than {piece.end} bytes"}
            raise CallError("DIGEST_MISMATCH", why, metadata=about)
        async with self._writing:
            await self._threads.run(self._part.write, piece.at, data)
        piece.at += count
        self._came(count)
        self._grown.set()


def range_bytes(size_bytes: int, streams_max: int) -> int:
    """How much of a blob one stream fetches, so that a small one has work for all streams too."""
    return min(RANGE_BYTES_MAX, max(RANGE_BYTES_MIN, -(-size_bytes // streams_max)))


def pause_s(tries: int) -> float:
    """Before the next of several tries in a row."""
    return min(RETRY_PAUSE_MAX_S, RETRY_PAUSE_S * 2.0 ** (tries - 1))


def load_failed(file: FileRef, why: str) -> CallError:
    """The refusal for a file that no retry brings here."""
    message = f"cannot fetch {file.path[:80]}: {why}"
    return CallError("MODEL_LOAD_FAILED", message, metadata={"model": file.path[:80], "cause": why[:200]})


async def _next_within(chunks: AsyncGenerator[memoryview, None], seconds: float) -> memoryview | None:
    try:
        return await asyncio.wait_for(anext(chunks, None), seconds)
    except TimeoutError:
        why = f"no byte came for {seconds:g} s"
        raise CallError("SERVICE_UNAVAILABLE", why, metadata={"service": "modelstore"}) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
