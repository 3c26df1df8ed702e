"""One file on a server, and how it is fetched."""

import os
from pathlib import Path

import pytest

from services.modelstore.adapters.web import HttpFiles
from services.modelstore.core.refusal import Refused
from services.modelstore.core.urls import parse_url

DATA = os.urandom(50_000)


def files(prefixes=None, silence_max_s=5.0):
    return HttpFiles(prefixes, retry_wait_s=0.001, silence_max_s=silence_max_s)


async def fetch(url, file, bytes_max=1 << 30, by=None):
    return [event async for event in (by or files()).fetch(parse_url(url), str(file), bytes_max)]


async def refusal(url, file, by=None):
    with pytest.raises(Refused) as caught:
        await fetch(url, file, by=by)
    return caught.value


def served(folder: Path, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}
