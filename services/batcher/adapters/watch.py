"""Keeps one stream of load reports open to every worker that discovery names.

A stream that breaks is opened again after a pause that grows to `PAUSE_MAX_S`; a worker that left
discovery is let go at once. Nothing is kept from one stream to the next: a stream's first report says
everything, and each later one what changed since the one before it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from loom.worker.v1 import worker_pb2

from services.batcher.adapters.reports import load_report
from services.batcher.core.ports import Discovery, FleetListener
from tokenloom.kit.channels import open_channel
from tokenloom.kit.logs import get_logger

PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 1.0
METHOD = "/loom.worker.v1.WorkerService/WatchLoad"
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

log = get_logger(__name__)


class GrpcFleetWatch:
    """`FleetWatch` over `WorkerService/WatchLoad`."""

    def __init__(self, discovery: Discovery, subscriber: str, interval_s: float) -> None:
        self._discovery = discovery
        self._interval_s = interval_s
        self._request = worker_pb2.WatchLoadRequest(subscriber=subscriber).SerializeToString()
        self._discovered = False
        self._loop: asyncio.Task[None] | None = None
        self._watching: dict[str, asyncio.Task[None]] = {}

    @property
    def discovered(self) -> bool:
        return self._discovered

    def start(self, listener: FleetListener) -> None:
        self._loop = asyncio.create_task(self._discover(listener))

    async def close(self) -> None:
        tasks = [task for task in (self._loop, *self._watching.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watching.clear()

    async def _discover(self, listener: FleetListener) -> None:
        while True:
            try:
                found = await self._discovery.endpoints()
            except OSError as error:
                log.warning("workers cannot be looked up; the known ones stay", error=str(error))
            else:
                await self._follow(found, listener)
                self._discovered = True
            await asyncio.sleep(self._interval_s)

    async def _follow(self, found: frozenset[str], listener: FleetListener) -> None:
        gone = {endpoint: task for endpoint, task in self._watching.items() if endpoint not in found}
        for endpoint, task in gone.items():
            del self._watching[endpoint]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            listener.removed(endpoint)
        for endpoint in sorted(found - self._watching.keys()):
            listener.found(endpoint)
            self._watching[endpoint] = asyncio.create_task(self._watch(endpoint, listener))

    async def _watch(self, endpoint: str, listener: FleetListener) -> None:
        channel = open_channel(endpoint)
        pause_s = PAUSE_MIN_S
        try:
            while True:
                reported = await self._listen(channel, endpoint, listener)
                pause_s = PAUSE_MIN_S if reported else min(pause_s * 2, PAUSE_MAX_S)
                await asyncio.sleep(pause_s)
        finally:
            await channel.close(None)

    async def _listen(self, channel: grpc.aio.Channel, endpoint: str, listener: FleetListener) -> bool:
        """One stream until it breaks; whether it delivered a report."""
        call: Any = channel.unary_stream(METHOD, None, None)(self._request, wait_for_ready=True)
        reported = False
        try:
            # Reading by hand: iterating costs an asynchronous generator's turn more for each report.
            while (data := await call.read()) is not _EOF:
                response = worker_pb2.WatchLoadResponse.FromString(data)
                listener.reported(endpoint, load_report(response.report))
                reported = True
        except grpc.aio.AioRpcError as error:
            log.debug("load stream broke", worker=endpoint, error=error.details())
        except DecodeError as error:
            log.warning("a load report cannot be read", worker=endpoint, error=str(error))
        except Exception:
            # A defect of ours must not leave a worker unwatched for good: log it and subscribe again.
            log.exception("load report failed", worker=endpoint)
        finally:
            call.cancel()
            if reported:
                listener.lost(endpoint)
        return reported
