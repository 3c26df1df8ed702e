"""Files and folders of this machine as sources, inside the roots that a modelstore may import from."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from services.modelstore.core.ports import BytesDone, Source, SourceFile
from services.modelstore.core.refusal import Refused, source_invalid

FOLDER_FILES_MAX = 10_000
HASH_CHUNK_BYTES = 4 * 1024 * 1024


class LocalSources:
    """The port `Sources`. `roots` None allows every path: for a caller who could read them anyway."""

    def __init__(self, roots: Sequence[Path] | None) -> None:
        self._roots = None if roots is None else [root.resolve() for root in roots]

    def open(self, source: str) -> Source:
        location = Path(os.path.realpath(source))
        label = location.name or source
        # Allowed first, existing second: outside the roots nobody learns what exists.
        self._check_allowed(source, location)
        try:
            is_folder = stat.S_ISDIR(location.stat().st_mode)
            names = sorted(os.listdir(location)) if is_folder else [location.name]
        except OSError as error:
            why = error.strerror or "it cannot be read"
            raise Refused("SOURCE_NOT_FOUND", f"{source}: {why}", source=source) from None
        if len(names) > FOLDER_FILES_MAX:
            raise source_invalid(label, f"is a folder of {len(names)} files; at most {FOLDER_FILES_MAX}")
        parent = location if is_folder else location.parent
        found = [self._file(source, parent / name, name) for name in names]
        files = tuple(file for file in found if file is not None)
        if not is_folder and not files:
            raise source_invalid(label, "is no regular file")
        return Source(label, str(location), is_folder, files)

    def head(self, file: SourceFile, size: int) -> bytes:
        with _readable(file), open(file.location, "rb") as opened:
            return opened.read(size)

    def hash(self, file: SourceFile, on_bytes: BytesDone) -> str:
        with _readable(file):
            return hash_file(Path(file.location), on_bytes)

    def changed(self, file: SourceFile) -> bool:
        """Whether the file is no longer the one that `open` saw."""
        try:
            return _stamp(os.stat(file.location)) != file.stamp
        except OSError:
            return True

    def _file(self, source: str, path: Path, name: str) -> SourceFile | None:
        """None for what is no regular file."""
        location = Path(os.path.realpath(path))
        try:
            status = location.stat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        self._check_allowed(f"{source}: {name}", location)
        if not os.access(location, os.R_OK):
            raise Refused("SOURCE_NOT_FOUND", f"{source}: {name} may not be read", source=source)
        return SourceFile(name, str(location), status.st_size, _stamp(status))

    def _check_allowed(self, shown: str, location: Path) -> None:
        if self._roots is None or any(location.is_relative_to(root) for root in self._roots):
            return
        allowed = ", ".join(str(root) for root in self._roots) or "no folder"
        raise Refused(
            "PERMISSION_DENIED",
            f"{shown}: this modelstore imports from {allowed}; "
            "add the folder to TOKENLOOM_MODELSTORE_IMPORT_ROOTS",
            permission="import_roots",
        )


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """What goes wrong with a source is the source's."""
    try:
        yield
    except OSError as error:
        why = error.strerror or "it failed"
        raise source_invalid(file.path, f"could not be read to its end ({why}); import it again") from error


def hash_file(path: Path, on_bytes: BytesDone) -> str:
    """`sha256:…` of a file. Blocks."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as opened:
        while size := opened.readinto(buffer):
            digest.update(view[:size])
            on_bytes(size)
    return f"sha256:{digest.hexdigest()}"


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
