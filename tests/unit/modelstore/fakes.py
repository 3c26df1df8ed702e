"""Fakes for imports: a converter without torch, and objects that stop in the middle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.ports import ConversionJob, Converted, Progress
from services.modelstore.core.refusal import Refused
from services.modelstore.core.urls import Url
from services.modelstore.core.web import Absent, Arrived, TooLarge
from tests.unit.modelstore.made import facts


class FakeConverter:
    """Copies the source's bytes into a `model.safetensors` of its own."""

    def __init__(self) -> None:
        self.jobs: list[ConversionJob] = []
        self.version = "1"
        self.staged: list[str] = []

    def versions(self) -> Mapping[str, str]:
        return {"converter": self.version}

    async def convert(self, job: ConversionJob) -> AsyncGenerator[Progress | Converted, None]:
        self.jobs.append(job)
        yield Progress("convert", 0, 10)
        self._write(job, Path(job.output_dir))
        yield Progress("convert", 10, 10)
        yield Converted(facts(dtype=job.dtype).to_json(), ["model.safetensors", "config.json"])

    def _write(self, job: ConversionJob, output: Path) -> None:
        self.staged = sorted(os.listdir(job.source))
        content = b"".join(Path(job.source, name).read_bytes() for name in self.staged)
        (output / "model.safetensors").write_bytes(job.dtype.encode() + content)
        (output / "config.json").write_bytes(b"{}")


class Killed(Exception):
    """The process ended here, as far as the objects are concerned."""


class MortalObjects(MemoryObjects):
    """Dies at the write number `writes_left`."""

    def __init__(self, writes_left: int) -> None:
        super().__init__()
        self._writes_left = writes_left

    def _write(self) -> None:
        if self._writes_left == 0:
            raise Killed
        self._writes_left -= 1

    async def create(self, path: str, data: bytes) -> bool:
        self._write()
        return await super().create(path, data)

    async def put(self, path: str, data: bytes) -> None:
        self._write()
        await super().put(path, data)

    async def adopt(self, path: str, file: str) -> None:
        self._write()
        await super().adopt(path, file)


class FakeWeb:
    """Serves `files` by URL, without any resuming. A value that is an exception is raised halfway."""

    def __init__(self, files: Mapping[str, bytes | Exception]) -> None:
        self.files = dict(files)
        self.asked: list[str] = []
        self.compared: list[str] = []

    def check_allowed(self, url: Url) -> None:
        if url.host == "forbidden":
            raise Refused("PERMISSION_DENIED", f"{url.shown}: not allowed", permission="import_urls")

    async def fetch(
        self, url: Url, file: str, bytes_max: int
    ) -> AsyncGenerator[Arrived | Absent | TooLarge, None]:
        self.asked.append(str(url))
        data = self.files.get(str(url))
        if data is None:
            await asyncio.to_thread(Path(file).unlink, missing_ok=True)
            yield Absent("answers 404")
            return
        if isinstance(data, Exception):
            yield Arrived(1, 2)
            raise data
        if len(data) > bytes_max:
            yield TooLarge(len(data))
            return
        await asyncio.to_thread(Path(file).write_bytes, data)
        yield Arrived(len(data), len(data))

    async def changed(self, url: Url, file: str) -> bool:
        self.compared.append(str(url))
        place = Path(file)

        def held() -> bytes | None:
            return place.read_bytes() if place.exists() else None

        return bool(await asyncio.to_thread(held) != self.files.get(str(url)))
