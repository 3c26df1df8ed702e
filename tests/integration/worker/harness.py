"""A worker front with sim engines, a fake modelstore beside it, and a typed client for both."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from loom.inference.v1 import inference_pb2
from loom.modelstore.v1 import modelstore_pb2
from loom.worker.v1 import worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from services.worker.app import WorkerApp
from services.worker.settings import WorkerSettings
from tests.integration.worker.processes import until
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error
from tokenloom.kit.server import Call, GrpcServer

STORE_SERVICE = modelstore_pb2.DESCRIPTOR.services_by_name["ModelStoreService"]
LOAD_S_MAX = 120
VERSION = f"sha256:{'a' * 64}"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class FakeModelStore:
    """Models and blobs in dictionaries; tests spoil them as they like."""

    models: dict[str, modelstore_pb2.Version] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fetches: list[tuple[str, int]] = field(default_factory=list)
    serve: Callable[[str, int, int], bytes | Exception] | None = None
    """Stands in for the bytes of (digest, offset, how many fetches there were before)."""

    def add_sim(
        self, name: str = "sim", version: str = VERSION, context_length: int = 8192, weight_bytes: int = 0
    ) -> None:
        manifest = modelstore_pb2.Manifest(
            name=name,
            architecture="Sim",
            model_type="sim",
            context_length=context_length,
            vocab_size=512,
            kv_bytes_per_token=1024,
            weight_bytes=weight_bytes,
        )
        self.models[name] = modelstore_pb2.Version(digest=version, manifest=manifest)

    async def ResolveModel(
        self, request: modelstore_pb2.ResolveModelRequest, call: Call
    ) -> modelstore_pb2.ResolveModelResponse:
        name = request.model.partition("@")[0]
        if name not in self.models:
            raise CallError("MODEL_NOT_FOUND", f"no model {name}", metadata={"model": name})
        return modelstore_pb2.ResolveModelResponse(version=self.models[name])

    async def GetVersion(
        self, request: modelstore_pb2.GetVersionRequest, call: Call
    ) -> modelstore_pb2.GetVersionResponse:
        for version in self.models.values():
            if version.digest == request.digest:
                return modelstore_pb2.GetVersionResponse(version=version)
        raise CallError("MODEL_NOT_FOUND", f"no version {request.digest}", metadata={"model": request.digest})

    async def FetchBlob(
        self, request: modelstore_pb2.FetchBlobRequest, call: Call
    ) -> AsyncIterator[modelstore_pb2.FetchBlobResponse]:
        before = len(self.fetches)
        self.fetches.append((request.digest, request.offset))
        if request.digest not in self.blobs:
            raise CallError("BLOB_NOT_FOUND", "no such blob", metadata={"digest": request.digest})
        data: bytes | Exception = self.blobs[request.digest][request.offset :]
        if self.serve is not None:
            data = self.serve(request.digest, request.offset, before)
        if isinstance(data, Exception):
            raise data
        for start in range(0, len(data), 1000):
            yield modelstore_pb2.FetchBlobResponse(data=data[start : start + 1000])


@asynccontextmanager
async def serve_store(store: FakeModelStore) -> AsyncIterator[str]:
    server = GrpcServer("127.0.0.1", 0)
    server.add(STORE_SERVICE, store)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class Client:
    """The worker's stub, with errors as CallError and whole streams as lists."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)

    def request(self, request_id: str = "r1", **fields: Any) -> worker_pb2.GenerateRequest:
        values: dict[str, Any] = {
            "request_id": request_id,
            "model_version": VERSION,
            "prompt_token_ids": [72, 105],
            "sampling": inference_pb2.SamplingParams(seed=7),
            "max_new_tokens": 16,
        }
        return worker_pb2.GenerateRequest(**{**values, **fields})

    def start(
        self, request: worker_pb2.GenerateRequest, *, lease: bool = True, timeout: float = 20, **extra: str
    ) -> Any:
        metadata = [("x-loom-lease", "lease-1")] if lease else []
        metadata += [(key.replace("_", "-"), value) for key, value in extra.items()]
        return self.stub.Generate(request, metadata=metadata, timeout=timeout)

    async def tokens(self, request: worker_pb2.GenerateRequest, **options: Any) -> list[int]:
        return [t for message in await self.messages(request, **options) for t in message.tokens.token_ids]

    async def messages(self, request: worker_pb2.GenerateRequest, **options: Any) -> list[Any]:
        try:
            return [message async for message in self.start(request, **options)]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def load(self, version: str, *, evict: bool = False) -> worker_pb2.ResidentModel:
        try:
            request = worker_pb2.LoadModelRequest(version=version, evict=evict)
            return (await self.stub.LoadModel(request, timeout=LOAD_S_MAX)).model
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def unload(self, version: str) -> None:
        try:
            await self.stub.UnloadModel(worker_pb2.UnloadModelRequest(version=version), timeout=LOAD_S_MAX)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def reports(self) -> AsyncIterator[worker_pb2.LoadReport]:
        call = self.stub.WatchLoad(worker_pb2.WatchLoadRequest(subscriber="test"))
        try:
            async for message in call:
                yield message.report
        finally:
            call.cancel()

    async def report_when(self, wanted: Callable[[worker_pb2.LoadReport], bool]) -> worker_pb2.LoadReport:
        """The first report that is as wanted."""
        async with asyncio.timeout(20):
            async for report in self.reports():
                if wanted(report):
                    return report
        raise AssertionError("the reports ended")


@dataclass
class Running:
    """One started worker."""

    app: WorkerApp
    client: Client
    channel: grpc.aio.Channel
    store: FakeModelStore

    async def ready(self) -> None:
        await until(lambda: self.app.readiness() == "")


@asynccontextmanager
async def run_worker(
    store: FakeModelStore | None = None, *, ready: bool = True, **settings: Any
) -> AsyncIterator[Running]:
    """A worker with the sim engine on free ports, ready to serve the model `sim`."""
    if store is None:
        store = FakeModelStore()
        store.add_sim()
    async with serve_store(store) as target:
        values = {
            "name": "worker-test",
            "port": 0,
            "engine": "sim",
            "models": "sim",
            "modelstore_target": target,
            "sim_step_ms": 2.0,
            "restart_backoff_max_s": 0.1,
        }
        app = WorkerApp(WorkerSettings(**{**values, **settings}), CollectorRegistry())
        await app.start()
        channel = open_channel(f"127.0.0.1:{app.port}")
        running = Running(app, Client(channel), channel, store)
        try:
            if ready:
                await running.ready()
            yield running
        finally:
            await channel.close(None)
            await app.close()
