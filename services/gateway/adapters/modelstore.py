"""The modelstore, seen from the gateway: a catalogue that follows it, and verified files.

The modelstore pushes every change, so what a name stands for is known here as soon as it is sent. The
last catalogue stays in use while the modelstore is away: names that were known go on working.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc

from services.gateway.core.canaries import Target
from services.gateway.core.catalogue import Catalogue, Deprecation, FileRef, ModelEntry, ModelVersion
from tokenloom.kit.errors import CallError, from_rpc_error
from tokenloom.kit.logs import get_logger

RETRY_INITIAL_S = 0.1
RETRY_MAX_S = 2.0
"""The longest pause between two attempts to follow again; each is drawn from its upper half."""
FETCH_TIMEOUT_S = 60.0

log = get_logger(__name__)


class ModelstoreCatalogue:
    """Implements `CatalogueSource`: one subscription that is renewed for as long as this lives."""

    def __init__(self, channel: grpc.aio.Channel, on_change: Callable[[Catalogue], None]) -> None:
        """`on_change` is called with each new snapshot and must not block."""
        self._stub: Any = modelstore_pb2_grpc.ModelStoreServiceStub(channel)
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self.snapshot: Catalogue | None = None
        self.arrived = asyncio.Event()
        """Set with the first snapshot."""

    def start(self) -> None:
        """Begin to follow; needs a running loop."""
        self._task = asyncio.create_task(self._follow(), name="catalogue")

    async def close(self) -> None:
        """End the subscription."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        pause_s = RETRY_INITIAL_S
        while True:
            call = self._stub.WatchModels(pb.WatchModelsRequest())
            try:
                async for update in call:
                    pause_s = RETRY_INITIAL_S
                    self.snapshot = catalogue_of(update.models)
                    self.arrived.set()
                    self._on_change(self.snapshot)
                log.info("the modelstore ended its catalogue; asking again")
            except grpc.RpcError as error:
                log.warning("no catalogue from the modelstore", error=str(from_rpc_error(error)))
            except Exception:  # A catalogue that cannot be read must not end the subscription.
                log.exception("a catalogue that cannot be read")
            finally:
                call.cancel()
            # Gateways that lost the same modelstore do not all come back at once.
            await asyncio.sleep(pause_s * (0.5 + random.random() / 2))
            pause_s = min(RETRY_MAX_S, pause_s * 2)


def catalogue_of(models: Sequence[pb.Model]) -> Catalogue:
    """The snapshot that a WatchModelsResponse stands for."""
    return Catalogue({model.name: _entry(model) for model in models})


def _entry(model: pb.Model) -> ModelEntry:
    aliases = {
        alias.name: tuple(Target(target.digest, max(1, target.weight)) for target in alias.targets)
        for alias in model.aliases
    }
    versions = {version.digest: _version(model.name, version) for version in model.versions}
    return ModelEntry(model.name, aliases, versions)


def _version(name: str, version: pb.Version) -> ModelVersion:
    manifest = version.manifest
    return ModelVersion(
        name=name,
        digest=version.digest,
        context_length=manifest.context_length,
        vocab_size=manifest.vocab_size,
        stop_token_ids=tuple(manifest.stop_token_ids),
        bos_token_id=manifest.bos_token_id if manifest.HasField("bos_token_id") else None,
        has_chat_template=manifest.has_chat_template,
        architecture=manifest.architecture,
        license=manifest.license,
        created_unix_ms=manifest.created_at.ToMilliseconds(),
        files=tuple(FileRef(f.path, f.digest, f.size_bytes) for f in manifest.files),
        weight_bytes=manifest.weight_bytes,
        deprecation=_deprecation(version),
    )


def _deprecation(version: pb.Version) -> Deprecation | None:
    if not version.HasField("deprecation"):
        return None
    return Deprecation(version.deprecation.message, version.deprecation.since.ToMilliseconds())


class BlobFetcher:
    """Reads whole blobs and checks their digests."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = modelstore_pb2_grpc.ModelStoreServiceStub(channel)

    async def fetch(self, file: FileRef, bytes_max: int) -> bytes:
        """The file's bytes. Raises CallError: too large, unreachable, or not what its name says."""
        if file.size_bytes > bytes_max:
            raise _unusable(f"{file.path} has {file.size_bytes} bytes; at most {bytes_max} are read", file)
        data = bytearray()
        call = self._stub.FetchBlob(pb.FetchBlobRequest(digest=file.digest), timeout=FETCH_TIMEOUT_S)
        try:
            async for part in call:
                data += part.data
                if len(data) > bytes_max:
                    raise _unusable(f"{file.path} is longer than its manifest says", file)
        except grpc.RpcError as error:
            cause = from_rpc_error(error)
            raise CallError(
                "SERVICE_UNAVAILABLE",
                f"the modelstore did not give {file.path}: {cause}",
                metadata={"service": "modelstore"},
                retry_after_s=1,
            ) from None
        finally:
            call.cancel()
        actual = "sha256:" + await asyncio.to_thread(_sha256, data)
        if actual != file.digest:
            message = f"{file.path}: the bytes stored as {file.digest} are {actual}; import the model again"
            raise CallError("DIGEST_MISMATCH", message, metadata={"digest": file.digest, "actual": actual})
        return bytes(data)


def _sha256(data: bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _unusable(message: str, file: FileRef) -> CallError:
    return CallError("MODEL_UNSUPPORTED", message, metadata={"cause": file.path})
