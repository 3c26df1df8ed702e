"""loom.modelstore.v1.ModelStoreService: translates between messages and the store, and decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore import metrics, wire
from services.modelstore.blobs import Blobs
from services.modelstore.core import deprecations
from services.modelstore.core.checks import HISTORY_DEFAULT, check_alias_name, check_history, check_min_age
from services.modelstore.core.ports import StoreError
from services.modelstore.core.refusal import Refused
from services.modelstore.core.requests import check_alias, check_digest, check_import
from services.modelstore.garbage import Collector
from services.modelstore.importer import Imported, Importer
from services.modelstore.store import Store
from services.modelstore.verify import Damaged, Verified, Verifier
from tokenloom.kit.logs import get_logger

log = get_logger(__name__)

QUIET = frozenset({"WatchModels"})
"""Streams that live as long as their subscriber; a span of each would never end."""


class ModelStoreServicer:
    """`call` is not used: the same object answers offline callers, who have none."""

    def __init__(
        self, store: Store, importer: Importer, blobs: Blobs, collector: Collector, verifier: Verifier
    ) -> None:
        self._store = store
        self._importer = importer
        self._blobs = blobs
        self._collector = collector
        self._verifier = verifier
        self._ending = asyncio.Event()

    def end_watches(self) -> None:
        """End every WatchModels stream, so that a drain need not wait for its subscribers."""
        self._ending.set()

    async def ListModels(self, request: pb.ListModelsRequest, call: object) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=wire.models(self._store.catalogue))

    async def GetVersion(self, request: pb.GetVersionRequest, call: object) -> pb.GetVersionResponse:
        wire.refuse(check_digest("digest", request.digest))
        with _translated():
            return pb.GetVersionResponse(version=wire.version(self._store.catalogue.version(request.digest)))

    async def ResolveModel(self, request: pb.ResolveModelRequest, call: object) -> pb.ResolveModelResponse:
        with _translated():
            return pb.ResolveModelResponse(version=wire.version(await self._store.resolve(request.model)))

    async def WatchModels(
        self, request: pb.WatchModelsRequest, call: object
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        with metrics.WATCHERS.track_inprogress():
            ending = asyncio.create_task(self._ending.wait())
            try:
                while not self._ending.is_set():
                    generation = self._store.generation
                    yield pb.WatchModelsResponse(models=wire.models(self._store.catalogue))
                    newer = asyncio.create_task(self._store.newer_than(generation))
                    await asyncio.wait([newer, ending], return_when=asyncio.FIRST_COMPLETED)
                    newer.cancel()
                    await asyncio.gather(newer, return_exceptions=True)
            finally:
                ending.cancel()

    async def ImportModel(
        self, request: pb.ImportModelRequest, call: object
    ) -> AsyncGenerator[pb.ImportModelResponse, None]:
        checked = wire.import_request(request)
        wire.refuse(check_import(checked))
        with metrics.IMPORTS_RUNNING.track_inprogress(), _import_outcome() as outcome, _translated():
            async with aclosing(self._importer.run(checked)) as events:
                async for event in events:
                    if isinstance(event, Imported):
                        outcome.append("created" if event.created else "same")
                    yield wire.import_event(event)

    async def SetAlias(self, request: pb.SetAliasRequest, call: object) -> pb.SetAliasResponse:
        targets = wire.targets(request.targets)
        wire.refuse(check_alias(request.model, request.alias, targets))
        expected = request.expected_sequence if request.HasField("expected_sequence") else None
        with _translated():
            state = await self._store.set_alias(request.model, request.alias, targets, expected)
        metrics.ALIAS_CHANGES.inc()
        return pb.SetAliasResponse(alias=wire.alias(state))

    async def ListAliasHistory(
        self, request: pb.ListAliasHistoryRequest, call: object
    ) -> pb.ListAliasHistoryResponse:
        wire.refuse(check_history(request.model, request.alias, request.limit))
        limit = request.limit or HISTORY_DEFAULT
        with _translated():
            changes = await self._store.alias_history(request.model, request.alias, limit)
        return pb.ListAliasHistoryResponse(changes=[wire.alias(state) for state in changes])

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, call: object) -> pb.DeleteAliasResponse:
        wire.refuse(check_alias_name(request.model, request.alias))
        expected = request.expected_sequence if request.HasField("expected_sequence") else None
        with _translated():
            await self._store.delete_alias(request.model, request.alias, expected)
        metrics.ALIAS_CHANGES.inc()
        return pb.DeleteAliasResponse()

    async def SetDeprecation(
        self, request: pb.SetDeprecationRequest, call: object
    ) -> pb.SetDeprecationResponse:
        problems = deprecations.problems(request.deprecated, request.message)
        wire.refuse(check_digest("digest", request.digest) + problems)
        with _translated():
            version = await self._store.set_deprecation(request.digest, request.deprecated, request.message)
        return pb.SetDeprecationResponse(version=wire.version(version))

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, call: object) -> pb.DeleteVersionResponse:
        wire.refuse(check_digest("digest", request.digest))
        with _translated():
            await self._store.delete_version(request.digest)
        return pb.DeleteVersionResponse()

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, call: object
    ) -> pb.CollectGarbageResponse:
        wire.refuse(check_min_age(request.min_age_ms))
        with _translated():
            done = await self._collector.run(request.dry_run, request.min_age_ms)
        if not request.dry_run:
            metrics.COLLECTED_BLOBS.inc(len(done.deleted))
            metrics.COLLECTED_BYTES.inc(sum(file.size_bytes for file in done.deleted))
        return wire.collected(done)

    async def Verify(
        self, request: pb.VerifyRequest, call: object
    ) -> AsyncGenerator[pb.VerifyResponse, None]:
        with _translated():
            async with aclosing(self._verifier.run(request.model)) as events:
                async for event in events:
                    if isinstance(event, Damaged):
                        metrics.DAMAGED.inc()
                        log.error("blob is damaged", digest=event.digest, cause=event.problem)
                    elif isinstance(event, Verified):
                        metrics.VERIFIED_BYTES.inc(event.bytes)
                    yield wire.verify_event(event)

    async def FetchBlob(
        self, request: pb.FetchBlobRequest, call: object
    ) -> AsyncGenerator[wire.BlobPiece, None]:
        wire.refuse(check_digest("digest", request.digest))
        with metrics.FETCHES_RUNNING.track_inprogress(), _translated():
            pieces = self._blobs.fetch(request.digest, request.offset, request.length)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield wire.BlobPiece(piece)
                    metrics.FETCHED_BYTES.inc(len(piece))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Refused as refusal:
        if refusal.reason == "DIGEST_MISMATCH":
            metrics.DIGEST_MISMATCHES.inc()
            log.error("blob is damaged", digest=refusal.metadata["digest"], cause=refusal.message)
        raise wire.call_error(refusal) from None
    except StoreError as error:
        raise wire.store_unavailable(error) from error


@contextmanager
def _import_outcome() -> Iterator[list[str]]:
    """Counts an import by how it ended; the block appends what it knows about a good end."""
    start_s = time.monotonic()
    outcome: list[str] = []
    ended = "failed"
    try:
        yield outcome
        ended = outcome[-1] if outcome else "failed"
    except (asyncio.CancelledError, GeneratorExit):
        ended = "stopped"
        raise
    except Exception as error:
        ended = "refused" if hasattr(error, "reason") else "failed"
        raise
    finally:
        metrics.IMPORTS.labels(ended).inc()
        if ended in ("created", "same"):
            metrics.IMPORT_SECONDS.observe(time.monotonic() - start_s)
