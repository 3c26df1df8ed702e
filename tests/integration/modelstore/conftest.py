"""The real modelstore in this process, over gRPC."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from services.modelstore.app import ModelstoreService
from services.modelstore.settings import ModelstoreSettings
from tests.integration.modelstore.converting import converting_here
from tests.integration.modelstore.fetching import DATA
from tests.integration.modelstore.web import FileServer, serving
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error
from tokenloom.kit.settings import load_settings


@dataclass
class House:
    """A running modelstore and a client."""

    service: ModelstoreService
    stub: Any
    store: Path
    sources: Path

    async def import_model(self, source, name="m", **fields) -> tuple[pb.Imported, list[pb.Progress]]:
        """The end of an import, and its progress. Raises CallError."""
        request = pb.ImportModelRequest(source=str(source), name=name, **fields)
        events = []
        try:
            async for response in self.stub.ImportModel(request):
                events.append(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        assert events[-1].HasField("imported")
        return events[-1].imported, [event.progress for event in events[:-1]]

    async def call(self, method, request):
        """A unary call. Raises CallError."""
        try:
            return await getattr(self.stub, method)(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def fetch(self, digest, offset=0, length=0) -> bytes:
        """A blob or a piece of one. Raises CallError."""
        request = pb.FetchBlobRequest(digest=digest, offset=offset, length=length)
        data = bytearray()
        try:
            async for response in self.stub.FetchBlob(request):
                data += response.data
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return bytes(data)

    async def file(self, version, path) -> bytes:
        """One file of a version, its digest checked as a receiver does."""
        found = next(f for f in version.manifest.files if f.path == path)
        data = await self.fetch(found.digest)
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == found.digest
        return data

    async def refused(self, reason, awaitable) -> CallError:
        """The error, which has to be this one and in one line."""
        with pytest.raises(CallError) as caught:
            await awaitable
        assert caught.value.reason == reason, caught.value.message
        assert "\n" not in caught.value.message
        return caught.value


@asynccontextmanager
async def running(store: Path, roots: str, **settings: str) -> AsyncIterator[House]:
    """A modelstore on a folder."""
    names = {"PORT": "0", "STORE_DIR": str(store), "IMPORT_ROOTS": roots, "POLL_INTERVAL_MS": "50"} | settings
    environ = {f"TOKENLOOM_MODELSTORE_{key}": value for key, value in names.items()}
    service = ModelstoreService(load_settings(ModelstoreSettings, environ))
    await service.start()
    channel = open_channel(f"127.0.0.1:{service.port}")
    try:
        yield House(service, rpc.ModelStoreServiceStub(channel), store, Path(roots.split(",")[0]))
    finally:
        await channel.close(None)
        await service.drain(0)
        await service.close()


@pytest.fixture(name="converting_here")
def _converting_here() -> Iterator[None]:
    """For a test that is not about the converter's process, which takes seconds to load its libraries."""
    with converting_here():
        yield


@pytest.fixture
async def house(tmp_path) -> AsyncIterator[House]:
    sources = tmp_path / "sources"
    sources.mkdir()
    async with running(tmp_path / "store", str(sources)) as made:
        yield made


@pytest.fixture
def unused_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
async def server() -> AsyncIterator[FileServer]:
    async with serving(FileServer({"/m.bin": DATA})) as found:
        yield found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a download lands."""
    return tmp_path / "m.bin"
