"""Letting go of pages of weight files that were read: what was packed from them needs them no more.

safetensors maps files into memory, and a page that was read stays with the process as long as anything of
its file is in use, which on a CPU the embedding is. So a model would be there twice. A page that is let go
comes back from the page cache when it is read again. Bound: `KEPT_BYTES_MAX` read and not let go yet.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

MAPS = Path("/proc/self/maps")
KEPT_BYTES_MAX = 32 * 1024 * 1024


class MappedFiles:
    """The safetensors files of a folder, which this process maps and never writes to."""

    def __init__(self, folder: Path) -> None:
        self._names = {os.path.realpath(path) for path in folder.glob("*.safetensors")}
        self._read_bytes = 0

    def was_read(self, size_bytes: int) -> None:
        """So many bytes of them are of no use here any more."""
        self._read_bytes += size_bytes
        if self._read_bytes >= KEPT_BYTES_MAX:
            self.let_go()

    def let_go(self) -> None:
        """Every page of them leaves this process. Nothing happens where the system cannot do that."""
        self._read_bytes = 0
        advise = getattr(ctypes.CDLL(None), "madvise", None)
        if advise is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, size in self._mappings():
            advise(begin, size, mmap.MADV_DONTNEED)

    def _mappings(self) -> list[tuple[int, int]]:
        """Address and bytes of each. Asked anew every time: the address of one that is gone is another's."""
        found = []
        try:
            lines = MAPS.read_text().splitlines()
        except OSError:
            return []
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self._names:
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                found.append((begin, end - begin))
        return found
