"""The modelstore over gRPC, as the front's `ModelStore` and the weight cache's source of bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc

from services.worker.front.ports import FileRef, ModelVersion
from tokenloom.kit.errors import CallError, from_rpc_error

ASK_TIMEOUT_S = 10.0
"""For one small question."""
CONFIG = "config.json"
CONFIG_BYTES_MAX = 1024 * 1024
FETCH_BLOB = "/loom.modelstore.v1.ModelStoreService/FetchBlob"
LENGTH_BYTES_MAX = 6
"""A length of 32 bits, after its tag."""
_DATA_TAG = pb.FetchBlobResponse.DATA_FIELD_NUMBER << 3 | 2


class GrpcModelStore:
    """A client of `loom.modelstore.v1.ModelStoreService`."""

    def __init__(self, channel: grpc.aio.Channel, target: str) -> None:
        self._target = target
        self._channel = channel
        self._stub = modelstore_pb2_grpc.ModelStoreServiceStub(channel)

    async def resolve(self, model: str) -> ModelVersion:
        """The version that a model string stands for. Raises CallError."""
        try:
            request = pb.ResolveModelRequest(model=model)
            response = await self._stub.ResolveModel(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        return await self._known(response.version)

    async def get_version(self, digest: str) -> ModelVersion:
        """One version by its whole digest. Raises CallError."""
        try:
            request = pb.GetVersionRequest(digest=digest)
            response = await self._stub.GetVersion(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        return await self._known(response.version)

    async def fetch(self, digest: str, offset: int, length: int) -> AsyncGenerator[memoryview, None]:
        """`length` bytes of a blob from `offset` on. Raises CallError."""
        request = pb.FetchBlobRequest(digest=digest, offset=offset, length=length)
        # Without a parser: the bytes that came are looked at, not copied.
        fetch: Any = self._channel.unary_stream(FETCH_BLOB, pb.FetchBlobRequest.SerializeToString, None)
        call = fetch(request)
        try:
            async for message in call:
                yield data_of(message)
        except grpc.RpcError as error:
            raise self._refusal(error) from None
        finally:
            call.cancel()

    async def _known(self, version: pb.Version) -> ModelVersion:
        """With what only its configuration says. Raises CallError."""
        found = to_version(version)
        config = next((file for file in found.files if file.path == CONFIG), None)
        if config is None or not 0 < config.size_bytes <= CONFIG_BYTES_MAX:
            return found
        parts = self.fetch(config.digest, 0, config.size_bytes)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                data = b"".join([bytes(part) async for part in parts])
        except TimeoutError:
            why = f"the modelstore at {self._target} brings no {CONFIG} within {ASK_TIMEOUT_S:g} s"
            raise CallError("SERVICE_UNAVAILABLE", why, metadata={"service": "modelstore"}) from None
        return with_config(found, data)

    def _refusal(self, error: grpc.RpcError) -> CallError:
        refusal = from_rpc_error(error)
        if refusal.reason != "SERVICE_UNAVAILABLE":
            return refusal
        why = f"the modelstore at {self._target} cannot be reached"
        return CallError(refusal.reason, why, metadata={"service": "modelstore"})


def data_of(message: bytes) -> memoryview:
    """The `data` of a FetchBlobResponse, in place: a parser would copy it. Raises CallError."""
    # The usual message is this one field: its tag, its length in groups of 7 bits, its bytes.
    length = 0
    for at, byte in enumerate(message[1:LENGTH_BYTES_MAX], 1):
        length |= (byte & 0x7F) << 7 * (at - 1)
        if byte < 0x80:
            if message[0] == _DATA_TAG and at + 1 + length == len(message):
                return memoryview(message)[at + 1 :]
            break
    try:
        return memoryview(pb.FetchBlobResponse.FromString(message).data)
    except DecodeError:
        why = "the modelstore sent bytes that are no FetchBlobResponse"
        raise CallError("SERVICE_UNAVAILABLE", why, metadata={"service": "modelstore"}) from None


def to_version(version: pb.Version) -> ModelVersion:
    """What the front needs of a manifest."""
    manifest = version.manifest
    return ModelVersion(
        digest=version.digest,
        name=manifest.name,
        context_length=manifest.context_length,
        vocab_size=manifest.vocab_size,
        kv_bytes_per_token=manifest.kv_bytes_per_token,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        weight_bytes=manifest.weight_bytes,
        files=tuple(FileRef(f.path, f.digest, f.size_bytes) for f in manifest.files),
    )


def with_config(version: ModelVersion, data: bytes) -> ModelVersion:
    """The version with the facts of its config.json; as it was where that cannot be read."""
    try:
        config = json.loads(data)
        hidden, tied = config["hidden_size"], config.get("tie_word_embeddings", True)
    except (ValueError, KeyError, TypeError, AttributeError):
        return version
    if not isinstance(hidden, int) or hidden < 0:
        return version
    return replace(version, hidden_size=hidden, tied=tied is not False)
