"""Builds the real gateway out of its parts, and starts and stops them in order."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loom.batcher.v1 import batcher_pb2
from loom.inference.v1 import inference_pb2

from services.gateway.adapters.mesh import GrpcMesh
from services.gateway.adapters.model_text import TextLimits
from services.gateway.adapters.modelstore import BlobFetcher, ModelstoreCatalogue
from services.gateway.adapters.text_store import ModelTextStore, StoreLimits
from services.gateway.adapters.waiting import RequestWatch
from services.gateway.core.canaries import Canaries
from services.gateway.core.catalogue import Catalogue
from services.gateway.core.retry import RetryPolicy
from services.gateway.http_door import make_app
from services.gateway.http_server import HttpServer
from services.gateway.pipeline import Pipeline, PipelineLimits
from services.gateway.runner import RunnerTools
from services.gateway.servicer import InferenceServicer
from services.gateway.settings import GatewaySettings
from tokenloom.kit.channels import ChannelPool, open_channel
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.logs import get_logger
from tokenloom.kit.server import GrpcServer

log = get_logger(__name__)


class GatewayService:
    """One gateway process. After `start`, `http_port` and `grpc_port` are the bound ones."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.http_port = settings.http_port
        self.grpc_port = settings.grpc_port
        self._mesh = ChannelPool(settings.mesh_target, settings.mesh_channels)
        self._modelstore = open_channel(settings.modelstore_target)
        self._pool = ThreadPoolExecutor(settings.tokenise_threads, thread_name_prefix="tokenise")
        self._texts = ModelTextStore(
            BlobFetcher(self._modelstore),
            StoreLimits(settings.tokenizers_max, settings.tokenizer_bytes_max),
            TextLimits(settings.tokenise_inline_chars, 2 * settings.prompt_bytes_max),
            self._pool,
        )
        self.catalogue = ModelstoreCatalogue(self._modelstore, self._catalogue_changed)
        self.pipeline = Pipeline(
            self.catalogue,
            self._texts,
            _tools(settings, self._mesh),
            PipelineLimits(settings.requests_max, settings.prompt_bytes_max),
            Canaries(settings.aliases_max, secrets.token_bytes(16)),
            draw_seed=lambda: secrets.randbits(64),
        )
        self._grpc = GrpcServer(settings.host, settings.grpc_port)
        self._grpc.add(
            inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
            InferenceServicer(self.pipeline, settings.default_timeout_s),
        )
        if settings.batcher_target:
            self._grpc.add(
                batcher_pb2.DESCRIPTOR.services_by_name["BatcherService"],
                RequestWatch(settings.batcher_target),
                quiet={"WatchRequest"},
            )
        app = make_app(
            self.pipeline,
            body_bytes_max=settings.request_bytes_max,
            default_timeout_s=settings.default_timeout_s,
        )
        self._http = HttpServer(app, settings.host, settings.http_port)
        self._warming: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self.catalogue.start()
        self.grpc_port = await self._grpc.start()
        self.http_port = await self._http.start()
        log.info("gateway serves", http_port=self.http_port, grpc_port=self.grpc_port)

    def readiness(self) -> str:
        return self.pipeline.readiness()

    async def drain(self, grace_s: float) -> None:
        self.pipeline.draining = True
        await self._grpc.set_serving(False)
        await asyncio.gather(self._grpc.stop(grace_s), self._http.stop(grace_s))

    async def close(self) -> None:
        await asyncio.gather(self._grpc.stop(0), self._http.stop(0))
        await self.catalogue.close()
        for task in self._background:
            task.cancel()
        await self._texts.close()
        await self._mesh.close()
        await self._modelstore.close(None)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _catalogue_changed(self, catalogue: Catalogue) -> None:
        log.info("catalogue", models=catalogue.names())
        self._spawn(self._grpc.set_serving(not self.pipeline.draining))
        if self._warming is not None:
            # What an older catalogue named need not be warm any more.
            self._warming.cancel()
        self._warming = self._spawn(self._texts.warm(catalogue.in_use()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _tools(settings: GatewaySettings, mesh: ChannelPool) -> RunnerTools:
    policy = RetryPolicy(
        attempts_max=settings.attempts_max,
        breaks_max=settings.breaks_max,
        backoff_initial_s=settings.backoff_initial_ms / 1000,
        backoff_max_s=settings.backoff_max_ms / 1000,
    )
    return RunnerTools(GrpcMesh(mesh), policy, SystemClock(), random.random)


def build(settings: GatewaySettings) -> GatewayService:
    """For `tokenloom.kit.service.run`."""
    return GatewayService(settings)
