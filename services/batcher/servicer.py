"""gRPC in, driver out: translates `ExternalProcessor` and `loom.batcher.v1`, and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from loom.batcher.v1 import batcher_pb2 as pb

from services.batcher.adapters import ext_proc, spans, views
from services.batcher.core.messages import Reject, Usage
from services.batcher.driver import Driver
from services.batcher.metrics import BatcherMetrics
from services.batcher.stay import Stay
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import CallError, field_invalid
from tokenloom.kit.server import Call, Exchange

LEASES_MAX = 1_000
"""Leases that a state lists."""
INTERVAL_DEFAULT_MS = 1_000
INTERVAL_MIN_MS = 20
INTERVAL_MAX_MS = 60_000


class ExternalProcessor:
    """`envoy.service.ext_proc.v3.ExternalProcessor`: one stream for each request that Envoy carries."""

    def __init__(self, driver: Driver, clock: Clock, metrics: BatcherMetrics) -> None:
        self._driver = driver
        self._clock = clock
        self._metrics = metrics

    async def Process(self, exchange: Exchange[ext.ProcessingRequest], call: Call) -> None:
        """Hold the request, name its worker, and follow it to its end: the stream's end ends the lease."""
        first = await exchange.read()
        if first is None:
            return
        try:
            request = ext_proc.parse_request(first, self._clock)
        except CallError as error:
            self._metrics.malformed.inc()
            await exchange.write(ext_proc.refuse(error))
            return
        stay = self._driver.arrived(request)
        ahead: asyncio.Task[ext.ProcessingRequest | None] | None = None
        usage: Usage | None = None
        try:
            decision = stay.decision
            if decision is None:
                await exchange.write(ext_proc.hold(self._driver.hold_limit_s(stay)))
                ahead = _read_ahead(exchange, stay)
                decision = await stay.wait()
            if isinstance(decision, Reject):
                await exchange.write(ext_proc.refuse(ext_proc.refusal(decision)))
                return
            if decision is not None:
                await exchange.write(ext_proc.pick(decision))
            while True:
                message = await (ahead if ahead is not None else exchange.read())
                ahead = None
                if message is None:
                    return
                usage = self._note(stay, message) or usage
                await exchange.write(ext_proc.go_on(message))
        finally:
            _drop(ahead)
            self._driver.ended(stay, usage)
            if not call.left_out:
                spans.record(stay, call.context, self._clock.unix_ns())

    def _note(self, stay: Stay, message: ext.ProcessingRequest) -> Usage | None:
        """What passes by on the way back: who answered, and at the end what it cost."""
        kind = message.WhichOneof("request")
        if kind == "response_headers":
            self._driver.answered(stay, ext_proc.served_by(message.response_headers.headers))
        elif kind == "response_trailers":
            return ext_proc.usage(message.response_trailers.trailers)
        return None


def _read_ahead(
    exchange: Exchange[ext.ProcessingRequest], stay: Stay
) -> asyncio.Task[ext.ProcessingRequest | None]:
    """Read while the request is held: whatever comes, the wait is over. A caller that leaves may show as
    nothing but the end of Envoy's half of the stream."""
    task = asyncio.create_task(exchange.read())
    task.add_done_callback(lambda _: stay.wake())
    return task


def _drop(task: asyncio.Task[ext.ProcessingRequest | None] | None) -> None:
    """Nobody will await it any more."""
    if task is None or task.cancel() or task.cancelled():
        return
    task.exception()


class BatcherServicer:
    """`loom.batcher.v1.BatcherService`."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock

    async def GetState(self, request: pb.GetStateRequest, call: Call) -> pb.GetStateResponse:
        """Queues, workers and leases now."""
        return pb.GetStateResponse(state=self._state())

    async def WatchState(
        self, request: pb.WatchStateRequest, call: Call
    ) -> AsyncIterator[pb.WatchStateResponse]:
        """The same again after each interval in which anything happened."""
        interval_ms = request.interval_ms or INTERVAL_DEFAULT_MS
        if not INTERVAL_MIN_MS <= interval_ms <= INTERVAL_MAX_MS:
            bounds = f"must be {INTERVAL_MIN_MS} to {INTERVAL_MAX_MS:,} ms, not {interval_ms}"
            raise field_invalid(("interval_ms", bounds))
        seen = -1
        while True:
            if seen != self._driver.revision:
                seen = self._driver.revision
                yield pb.WatchStateResponse(state=self._state())
            await asyncio.sleep(interval_ms / 1000)

    async def WatchRequest(
        self, request: pb.WatchRequestRequest, call: Call
    ) -> AsyncIterator[pb.WatchRequestResponse]:
        """Places while it waits, then how that ended."""
        if not request.request_id:
            raise field_invalid(("request_id", "is empty"))
        async with aclosing(self._driver.watchers.follow(request.request_id)) as told:
            async for what in told:
                for response in views.news(what):
                    yield response

    async def Drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:
        """Refuse new requests from now on."""
        return pb.DrainResponse(remaining=self._driver.drain())

    def _state(self) -> pb.State:
        return views.state(self._driver.snapshot(LEASES_MAX), self._clock.unix_ms())
