"""Conversions in this process, for tests of what comes before and after one: torch is loaded here already.

That a conversion is a process of its own, that its crash ends one import only and that it ends with its
parent is tested where the real one runs: test_process.py, test_import_kills.py, test_import.py.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import pytest
import torch

from services.modelstore import app
from services.modelstore.adapters.process import SpawnedConverter
from services.modelstore.converter import __main__ as converter
from services.modelstore.core.ports import ConversionJob, Converted, Progress


class ConverterHere(SpawnedConverter):
    """The port `Converter`, with the versions and the results of the one that is a process."""

    async def convert(self, job: ConversionJob) -> AsyncGenerator[Progress | Converted, None]:
        yield Progress("convert", 0, 0)
        yield await asyncio.to_thread(converted, job)


def converted(job: ConversionJob) -> Converted:
    threads = torch.get_num_threads()
    try:
        return converter._convert(job, converter._Reporter(io.BytesIO()))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def converting_here() -> Iterator[None]:
    """Modelstores that are opened meanwhile, in this process, convert in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "SpawnedConverter", ConverterHere)
        yield
