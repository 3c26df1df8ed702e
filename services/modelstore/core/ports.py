"""What the store needs from the world: a place for objects, sources to read, a converter.

A place for objects promises three things, and everything else rests on them: a put is atomic, a create
never overwrites, and a listing shows every write that ended before it began.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class StoreError(OSError):
    """The place where the objects are cannot be used now: it is full, away, or lets nobody in."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing tells of an object."""

    path: str
    size_bytes: int
    modified_unix_ms: int
    """By the clock of the place, which is not this machine's; an object store's has whole seconds."""


class Objects(Protocol):
    """Named byte strings. Paths are relative and use `/`. No call blocks the event loop.

    Every call may raise StoreError; what it was doing may then have happened or not.
    """

    async def create(self, path: str, data: bytes) -> bool:
        """Write a new object, whole or not at all. False when `path` exists; it is left as it was."""
        ...

    async def put(self, path: str, data: bytes) -> None:
        """Write an object, whole or not at all, over what was there."""
        ...

    async def adopt(self, path: str, file: str) -> None:
        """Store a local file's bytes, whole or not at all, over what was there. The file may be moved."""
        ...

    async def get(self, path: str) -> bytes | None:
        """A small object, or None."""
        ...

    async def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end`. Raises FileNotFoundError."""
        ...

    async def size(self, path: str) -> int | None:
        """Its length in bytes, or None when there is no such object."""
        ...

    async def entries(self, prefix: str) -> list[Entry]:
        """The objects below a folder, in no order."""
        ...

    async def delete(self, path: str) -> None:
        """Remove an object; nothing happens when there is none."""
        ...

    async def sweep(self, before_unix_ms: int) -> int:
        """Remove what writers that were killed before then left half-written; how much there was."""
        ...


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. `stamp` changes when the file does."""

    path: str
    """Relative to the folder, or the file's own name."""
    location: str
    """Where to read it, every link resolved."""
    size_bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder that may be read."""

    label: str
    """The name that messages use."""
    location: str
    is_folder: bool
    files: tuple[SourceFile, ...]

    def file(self, path: str) -> SourceFile | None:
        """The file of this relative path, or None."""
        return next((f for f in self.files if f.path == path), None)


BytesDone = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Sources(Protocol):
    """Where imports come from. Calls block: they are made in threads."""

    def open(self, source: str) -> Source:
        """Raises Refused: SOURCE_NOT_FOUND, SOURCE_INVALID, PERMISSION_DENIED."""
        ...

    def head(self, file: SourceFile, size: int) -> bytes:
        """The file's first `size` bytes, fewer when it is shorter. Raises Refused with SOURCE_INVALID."""
        ...

    def hash(self, file: SourceFile, on_bytes: BytesDone) -> str:
        """`sha256:…` of the file. Raises Refused with SOURCE_INVALID."""
        ...

    def changed(self, file: SourceFile) -> bool:
        """Whether the file is no longer the one that `open` saw."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is. `total_bytes` is 0 while it is not known."""

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionJob:
    """What the converter is asked for. Paths are local."""

    kind: str
    """`gguf` or `folder`."""
    label: str
    source: str
    output_dir: str
    dtype: str
    shard_bytes_max: int
    threads: int
    license: str
    options: Mapping[str, str]
    """What the check of the source found and the conversion needs, e.g. GGUF's pre-tokenizer."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The converter's result: facts for the manifest. Its files lie in the job's output folder."""

    facts: Mapping[str, Any]
    files: Sequence[str]


class Converter(Protocol):
    """Runs conversions in a process of their own."""

    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries whose change may change the result."""
        ...

    def convert(self, job: ConversionJob) -> AsyncGenerator[Progress | Converted, None]:
        """Progress, then one Converted. Raises Refused; closing the generator ends the process."""
        ...
