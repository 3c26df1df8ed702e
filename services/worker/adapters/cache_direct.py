"""Blobs of a modelstore's folder on this machine, linked into the cache instead of copied.

A link is made under the blob's lock, and its digest is checked once, by who made it. A hard link keeps
the bytes when the store deletes them; where there can be none (another file system, another owner) it is a
symbolic one.
"""

from __future__ import annotations

import os
from pathlib import Path

from services.worker.adapters.blobfile import Blob


class StoreFolder:
    """`folder` as a modelstore lays it out. Nothing in it is ever written."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs" / "sha256"

    def offers(self, blob: Blob, size_bytes: int) -> bool:
        """Whether the store has this blob, to all appearance."""
        return Blob(self._blobs / blob.path.name).is_whole(size_bytes)

    def is_linked(self, blob: Blob) -> bool:
        """Whether the blob in the cache is the store's own file, so takes no room of its own."""
        try:
            return os.path.samefile(blob.path, self._blobs / blob.path.name)
        except OSError:
            return False

    def link(self, blob: Blob) -> bool:
        """Have the store's file as `blob`. False when it cannot be read; its bytes are not checked yet."""
        source = (self._blobs / blob.path.name).resolve()
        if not os.access(source, os.R_OK):
            return False
        blob.discard()
        link(source, blob.path)
        return True


def link(source: Path, place: Path) -> None:
    """Another name for a file: a hard link, else a symbolic one. Raises FileExistsError."""
    try:
        os.link(source, place)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no hard links, none has them across, and some owners forbid them.
        place.symlink_to(source)
