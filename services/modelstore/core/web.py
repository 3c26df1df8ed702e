"""What an import of an URL needs from the world: files that are brought here, and resumed after a kill."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from services.modelstore.core.urls import Url

DOWNLOAD_BYTES_MAX = 1 << 40
"""What one import may fetch, if nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """How much of a file is here. `total_bytes` is 0 while it is not known."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Absent:
    """The server has no such file."""

    why: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The file has this many bytes or more."""

    size_bytes: int


class Web(Protocol):
    """Files behind URLs."""

    def check_allowed(self, url: Url) -> None:
        """Raises Refused with PERMISSION_DENIED for an URL that may not be imported from."""
        ...

    def fetch(self, url: Url, file: str, bytes_max: int) -> AsyncGenerator[Arrived | Absent | TooLarge, None]:
        """Bring `file` to what is at `url` now, going on with what an earlier call left of it.

        Ends with the whole file, or with Absent or TooLarge. Raises Refused: PERMISSION_DENIED,
        SOURCE_INVALID, SERVICE_UNAVAILABLE; OSError of the disk.
        """
        ...

    async def changed(self, url: Url, file: str) -> bool:
        """Whether what is at `url` is no longer what `fetch` brought to `file`, or found absent.

        As far as the server tells, by ETag, date or length. Raises as `fetch`.
        """
        ...
