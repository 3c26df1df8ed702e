"""The modelstore over gRPC, as the front's `ModelStore` and the weight cache's source of bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc

from services.worker.front.ports import FileRef, ModelVersion
from tokenloom.kit.errors import CallError, from_rpc_error

ASK_TIMEOUT_S = 10.0
"""For one small question."""


class GrpcModelStore:
    """A client of `loom.modelstore.v1.ModelStoreService`."""

    def __init__(self, channel: grpc.aio.Channel, target: str) -> None:
        self._target = target
        self._stub = modelstore_pb2_grpc.ModelStoreServiceStub(channel)

    async def resolve(self, model: str) -> ModelVersion:
        """The version that a model string stands for. Raises CallError."""
        try:
            request = pb.ResolveModelRequest(model=model)
            response = await self._stub.ResolveModel(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        return to_version(response.version)

    async def get_version(self, digest: str) -> ModelVersion:
        """One version by its whole digest. Raises CallError."""
        try:
            request = pb.GetVersionRequest(digest=digest)
            response = await self._stub.GetVersion(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        return to_version(response.version)

    async def fetch(self, digest: str, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on. Raises CallError."""
        call = self._stub.FetchBlob(pb.FetchBlobRequest(digest=digest, offset=offset))
        try:
            async for message in call:
                yield message.data
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        finally:
            call.cancel()

    def _refusal(self, error: grpc.RpcError) -> CallError:
        refusal = from_rpc_error(error)
        if refusal.reason != "SERVICE_UNAVAILABLE":
            return refusal
        why = f"the modelstore at {self._target} cannot be reached"
        return CallError(refusal.reason, why, metadata={"service": "modelstore"})


def to_version(version: pb.Version) -> ModelVersion:
    """What the front needs of a manifest."""
    manifest = version.manifest
    return ModelVersion(
        digest=version.digest,
        name=manifest.name,
        context_length=manifest.context_length,
        vocab_size=manifest.vocab_size,
        kv_bytes_per_token=manifest.kv_bytes_per_token,
        files=tuple(FileRef(f.path, f.digest, f.size_bytes) for f in manifest.files),
    )
