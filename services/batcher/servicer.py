"""`ExternalProcessor` for Envoy and `BatcherService` for people: translation, no decisions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from loom.batcher.v1 import batcher_pb2 as pb
from opentelemetry.context import Context

from services.batcher.adapters import ext_proc, views
from services.batcher.core.messages import Dispatch, Reject, Usage
from services.batcher.driver import Decision, Driver, Stay
from tokenloom.kit import telemetry
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import CallError, field_invalid
from tokenloom.kit.server import Call

INTERVAL_DEFAULT_MS = 1_000
INTERVAL_MIN_MS = 20
INTERVAL_MAX_MS = 60_000
REQUEST_POLL_S = 0.05
ARRIVAL_WAIT_S = 1.0
"""How long `WatchRequest` waits for a request that did not arrive yet."""

Requests = AsyncIterator[ext.ProcessingRequest]
Responses = AsyncIterator[ext.ProcessingResponse]


class ExternalProcessorServicer:
    """One stream a request. Its end, whatever the cause, ends the request's stay here."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock

    async def Process(self, requests: Requests, call: Call) -> Responses:
        incoming = _Incoming(requests)
        stay: Stay | None = None
        usage: Usage | None = None
        try:
            while (message := await incoming.next()) is not None:
                kind = message.WhichOneof("request")
                if kind == "request_headers":
                    begun_ns = self._clock.unix_ns()
                    try:
                        request = ext_proc.parse_request(message.request_headers.headers, self._clock)
                    except CallError as error:
                        yield ext_proc.refuse(error)
                        return
                    stay = self._driver.arrive(request)
                    decision = stay.decision
                    if decision is None:
                        yield ext_proc.hold(self._driver.hold_limit_s(request))
                        decision = await incoming.unless_it_ends(stay.waiter)
                        if decision is None:
                            return
                    self._trace(call.context, decision, begun_ns)
                    if isinstance(decision, Reject):
                        yield ext_proc.refuse(ext_proc.refusal(decision))
                        return
                    yield ext_proc.pick(decision)
                elif kind == "response_headers":
                    if stay is not None:
                        served_by = ext_proc.served_by(message.response_headers.headers)
                        self._driver.response_seen(stay, served_by)
                    yield ext_proc.CONTINUE_RESPONSE_HEADERS
                elif kind == "response_trailers":
                    usage = ext_proc.usage(message.response_trailers.trailers)
                    yield ext_proc.CONTINUE_RESPONSE_TRAILERS
        finally:
            if stay is not None:
                self._driver.ended(stay, usage)
            await incoming.close()

    def _trace(self, context: Context, decision: Decision, begun_ns: int) -> None:
        """`queue` is the wait, `pick` what it took to decide and answer once it could be decided."""
        now_ns = self._clock.unix_ns()
        queued_ns = min(begun_ns + int(decision.waited_s * 1e9), now_ns)
        request = decision.request
        telemetry.record(
            "queue",
            begun_ns,
            queued_ns,
            context,
            {"loom.request_id": request.request_id, "loom.tenant": request.tenant},
        )
        if isinstance(decision, Dispatch):
            found = {"loom.endpoint": decision.endpoint, "loom.lease": decision.lease_id}
            telemetry.record("pick", queued_ns, now_ns, context, found)
        else:
            why = {"error.type": decision.reason}
            telemetry.record("pick", queued_ns, now_ns, context, why, error=decision.message)


class _Incoming:
    """Envoy's messages. A read that has begun is kept for later, because giving it up ends the stream."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._begun: asyncio.Future[ext.ProcessingRequest | None] | None = None

    async def next(self) -> ext.ProcessingRequest | None:
        """The next message; None when Envoy ended the stream."""
        begun, self._begun = self._begun, None
        return await (begun if begun is not None else anext(self._requests, None))

    async def unless_it_ends(self, waiter: asyncio.Future[Decision] | None) -> Decision | None:
        """The decision, or None when Envoy ended the stream first: its caller left."""
        assert waiter is not None
        self._begun = asyncio.ensure_future(anext(self._requests, None))
        both: set[asyncio.Future[Any]] = {self._begun, waiter}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return waiter.result() if waiter.done() else None

    async def close(self) -> None:
        """Give up what was begun."""
        if self._begun is not None:
            self._begun.cancel()
            await asyncio.gather(self._begun, return_exceptions=True)


class BatcherServicer:
    """What the command line, a console or a person debugging asks."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock

    async def GetState(self, _: pb.GetStateRequest, __: Call) -> pb.GetStateResponse:
        return pb.GetStateResponse(state=self._state())

    async def WatchState(
        self, request: pb.WatchStateRequest, _: Call
    ) -> AsyncIterator[pb.WatchStateResponse]:
        interval_ms = request.interval_ms or INTERVAL_DEFAULT_MS
        if not INTERVAL_MIN_MS <= interval_ms <= INTERVAL_MAX_MS:
            raise field_invalid(("interval_ms", f"must be from {INTERVAL_MIN_MS} to {INTERVAL_MAX_MS}"))
        while True:
            yield pb.WatchStateResponse(state=self._state())
            await asyncio.sleep(interval_ms / 1000)

    async def WatchRequest(
        self, request: pb.WatchRequestRequest, _: Call
    ) -> AsyncIterator[pb.WatchRequestResponse]:
        if not request.request_id:
            raise field_invalid(("request_id", "is empty: give the x-request-id of a request"))
        waited_s = 0.0
        last = None
        while True:
            place = self._driver.place_of(request.request_id)
            if place is None:
                if last is not None:
                    return
                if waited_s >= ARRIVAL_WAIT_S:
                    metadata = {"request_id": request.request_id}
                    raise CallError("REQUEST_NOT_FOUND", "no such request here", metadata=metadata)
            else:
                event = views.event(place)
                shown = views.without_time(event)
                if shown != last:
                    yield event
                    last = shown
                if event.WhichOneof("event") in ("dispatched", "refused"):
                    return
            await asyncio.sleep(REQUEST_POLL_S)
            waited_s += REQUEST_POLL_S

    async def Drain(self, _: pb.DrainRequest, __: Call) -> pb.DrainResponse:
        return pb.DrainResponse(remaining=self._driver.drain())

    def _state(self) -> pb.State:
        return views.state(self._driver.snapshot(), self._clock.unix_ms())
