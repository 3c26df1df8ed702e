"""Asks workers to load models, and tells what came of it.

A worker goes on with a load when the one who asked is gone, so nothing is lost with this process: its
reports show the load to whoever comes next. Bounds: `LOADS_MAX` calls at once; each ends after `timeout_s`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from loom.worker.v1 import worker_pb2

from services.batcher.core.messages import Verdict
from services.batcher.core.ports import LoadListener
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error
from tokenloom.kit.logs import get_logger

LOADS_MAX = 256
BUSY_RETRY_S = 1.0
DEFECT_RETRY_S = 10.0
METHOD = "/loom.worker.v1.WorkerService/LoadModel"

log = get_logger(__name__)


class GrpcLoader:
    """`ModelLoader` over `WorkerService/LoadModel`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._running: set[asyncio.Task[None]] = set()

    def load(self, endpoint: str, model: str, listener: LoadListener) -> None:
        """Returns at once; the listener hears the end from the event loop, never from inside this call."""
        task = asyncio.create_task(self._load(endpoint, model, listener), name=f"load {model[:19]}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Stop waiting for answers; listeners are not called any more."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, endpoint: str, model: str, listener: LoadListener) -> None:
        if len(self._running) > LOADS_MAX:
            why = f"{LOADS_MAX} models are being loaded already"
            listener.load_ended(endpoint, model, Verdict("QUEUE_FULL", why, {}, BUSY_RETRY_S))
            return
        log.info("model is to be loaded", worker=endpoint, version=model)
        try:
            verdict = await self._ask(endpoint, model)
        except Exception as error:
            # A defect of ours must not leave the model without an answer, and so unasked for, for good.
            log.exception("load failed", worker=endpoint, version=model)
            why = f"{endpoint} cannot be asked: {error}"
            verdict = Verdict("SERVICE_UNAVAILABLE", why, {}, DEFECT_RETRY_S)
        if verdict is None:
            log.info("model loaded", worker=endpoint, version=model)
        else:
            log.warning(
                "model was not loaded",
                worker=endpoint,
                version=model,
                reason=verdict.reason,
                why=verdict.message,
            )
        listener.load_ended(endpoint, model, verdict)

    async def _ask(self, endpoint: str, model: str) -> Verdict | None:
        request = worker_pb2.LoadModelRequest(version=model, evict=True).SerializeToString()
        try:
            async with open_channel(endpoint) as channel:
                method: Any = channel.unary_unary(METHOD, None, None)
                await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return _verdict(from_rpc_error(error))
        return None


def _verdict(error: CallError) -> Verdict:
    return Verdict(error.reason, error.message, error.metadata, error.retry_after_s)
