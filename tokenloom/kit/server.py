"""A grpc.aio server that turns bytes into messages, exceptions into statuses, and calls into spans.

Request bytes are parsed here, not by gRPC: its own parser answers UNKNOWN for bytes that are not a
message, and a caller's mistake must be INVALID_ARGUMENT. Handlers are plain classes:

    unary:         async def GetThing(self, request, call) -> Response
    server stream: async def WatchThing(self, request, call) -> AsyncIterator[Response]
    both streams:  async def Process(self, exchange, call) -> None, which reads and writes by hand: chains
                   of generators would cost as much as all else that a short exchange does
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing
from functools import cached_property
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode

from tokenloom.kit import telemetry
from tokenloom.kit.errors import STATUS_DETAILS_KEY, CallError, status_proto
from tokenloom.kit.logs import get_logger

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
METADATA_BYTES_MAX = 16 * 1024
STREAMS_MAX = 100_000
"""Calls at once on one server, and streams on one connection."""

Metadata = list[tuple[str, str | bytes]]
Handler = Callable[..., Any]
M = TypeVar("M", bound=Message)
log = get_logger(__name__)

_LEFT_OUT = "-00"
"""The flags of a `traceparent`, https://www.w3.org/TR/trace-context/#trace-flags."""
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_CANCELLED = Status(StatusCode.ERROR, "cancelled by the caller")


class Call:
    """One call as its handler sees it."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        self._grpc = context
        self.method = method
        self.metadata: dict[str, str | bytes] = dict(context.invocation_metadata() or ())
        self.span: trace.Span = trace.INVALID_SPAN
        self._initial: Metadata = []

    @cached_property
    def context(self) -> Context:
        """The caller's trace, or the server span in it."""
        return telemetry.extract(self.metadata)

    @property
    def left_out(self) -> bool:
        """Whether the caller says that this trace is not kept: nothing need be recorded for it."""
        parent = self.metadata.get("traceparent")
        return isinstance(parent, str) and parent.endswith(_LEFT_OUT)

    @property
    def peer(self) -> str:
        """The caller's address as gRPC writes it."""
        return str(self._grpc.peer())

    def deadline_s_left(self) -> float | None:
        """Seconds until the caller gives up, or None."""
        left: float | None = self._grpc.time_remaining()
        return left

    def set_initial(self, metadata: Metadata) -> None:
        """Response headers. They leave with the first message, never before it."""
        self._initial = metadata

    def set_trailing(self, metadata: Metadata) -> None:
        """Trailers of a call that ends well."""
        self._grpc.set_trailing_metadata(tuple(metadata))

    async def _send_initial(self) -> None:
        if self._initial:
            await self._grpc.send_initial_metadata(tuple(self._initial))

    async def _abort(self, error: CallError) -> None:
        details = status_proto(error)
        trailers = ((STATUS_DETAILS_KEY, details.SerializeToString()),)
        await self._grpc.abort(error.code, details.message, trailers)


class Exchange(Generic[M]):
    """Both streams of one call."""

    __slots__ = ("_grpc", "_method", "_request_class")

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], request_class: type[M], method: str
    ) -> None:
        self._grpc = context
        self._request_class = request_class
        self._method = method

    async def read(self) -> M | None:
        """The caller's next message; None when there are no more. One reader at a time.

        Raises CallError when it cannot be read.
        """
        data = await self._grpc.read()
        return None if data is _EOF else _parse(self._request_class, data, self._method)

    async def write(self, data: bytes) -> None:
        """Send one message, serialised."""
        await self._grpc.write(data)


class GrpcServer:
    """Serves any number of services on one port, with health and reflection."""

    def __init__(self, host: str, port: int, *, streams_max: int = STREAMS_MAX) -> None:
        self._address = f"{host}:{port}"
        self._server: Any = grpc.aio.server(
            maximum_concurrent_rpcs=streams_max,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_concurrent_streams", streams_max),
                # Calls that arrived and wait for a handler: gRPC's own bound of 1,000 cancels some at random.
                ("grpc.server.max_pending_requests", streams_max),
                ("grpc.server.max_pending_requests_hard_limit", streams_max),
                ("grpc.max_metadata_size", METADATA_BYTES_MAX),
                ("grpc.so_reuseport", 0),
                # Clients of the kit ping every 20 s, also without calls.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._names: list[str] = [""]
        self.port = port

    def add(self, service: ServiceDescriptor, servicer: object, *, quiet: Collection[str] = ()) -> None:
        """Register `servicer` for every method of `service` that it has; `quiet` ones get no span."""
        handlers = {}
        for method in service.methods:
            if (function := getattr(servicer, method.name, None)) is not None:
                handlers[method.name] = _handler(method, function, traced=method.name not in quiet)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )
        self._names.append(service.full_name)

    async def start(self) -> int:
        """Bind and serve; the bound port. Raises OSError when the port is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        shown = [name for name in self._names if name] + [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(shown, self._server)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(f"cannot bind {self._address}: is the port in use?") from error
        await self._server.start()
        self.port = int(port)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Answer health checks for the whole server and each of its services."""
        serving_status = health_pb2.HealthCheckResponse.SERVING
        status = serving_status if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; cancel those still running after `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _handler(method: MethodDescriptor, function: Handler, *, traced: bool) -> Any:
    request_class = GetMessageClass(method.input_type)
    name = f"{method.containing_service.full_name}/{method.name}"
    if not method.server_streaming:
        return grpc.unary_unary_rpc_method_handler(_unary(function, request_class, name, traced))
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(_both_streams(function, request_class, name, traced))
    return grpc.unary_stream_rpc_method_handler(_server_stream(function, request_class, name, traced))


def _parse(request_class: type[M], data: bytes, method: str) -> M:
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        name = request_class.DESCRIPTOR.full_name
        why = f"the request is not a {name} (invalid bytes or UTF-8): {error}"
        raise CallError("REQUEST_MALFORMED", why, metadata={"method": method}) from None


class _Scope:
    """What surrounds a handler: the server span, and the translation of its ending."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str, traced: bool) -> None:
        self.call = Call(context, method)
        self._method = method
        self._traced = traced
        self._token: Any = None

    async def __aenter__(self) -> Call:
        call = self.call
        if self._traced:
            attributes = {"rpc.system": "grpc", "rpc.method": self._method}
            call.span = telemetry.tracer().start_span(
                self._method, context=call.context, kind=SpanKind.SERVER, attributes=attributes
            )
            call.context = trace.set_span_in_context(call.span, call.context)
        if self._traced or not call.left_out:
            self._token = otel_context.attach(call.context)
        return call

    async def __aexit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        call = self.call
        try:
            if isinstance(error, CallError):
                self._failed(error)
                await call._abort(error)
            elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
                call.span.set_attribute("rpc.grpc.status_code", 1)
                call.span.set_status(_CANCELLED)
            elif isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
                log.exception("handler failed", method=self._method, exc_info=error)
                trace_id = telemetry.trace_id_of(call.context)
                message = (
                    f"internal error in {self._method}; the log of trace {trace_id or 'none'} has the cause"
                )
                failure = CallError("INTERNAL", message, metadata={"trace_id": trace_id})
                self._failed(failure)
                await call._abort(failure)
        finally:
            call.span.end()
            # A generator that its caller left is closed from another task, whose context is not ours.
            if self._token is not None and not isinstance(error, GeneratorExit):
                otel_context.detach(self._token)

    def _failed(self, error: CallError) -> None:
        self.call.span.set_attribute("rpc.grpc.status_code", error.code.value[0])
        self.call.span.set_attribute("error.type", error.reason)
        self.call.span.set_status(Status(StatusCode.ERROR, error.message))


def _unary(function: Handler, request_class: type[Message], name: str, traced: bool) -> Any:
    async def handle(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        async with _Scope(context, name, traced) as call:
            message: Message = await function(_parse(request_class, data, name), call)
            await call._send_initial()
            return message.SerializeToString()
        raise AssertionError("unreachable: the scope re-raises what it aborts with")

    return handle


def _server_stream(function: Handler, request_class: type[Message], name: str, traced: bool) -> Any:
    async def handle(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        async with (
            _Scope(context, name, traced) as call,
            aclosing(function(_parse(request_class, data, name), call)) as responses,
        ):
            first = True
            async for message in responses:
                if first:
                    first = False
                    await call._send_initial()
                yield message.SerializeToString()

    return handle


def _both_streams(function: Handler, request_class: type[Message], name: str, traced: bool) -> Any:
    async def handle(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with _Scope(context, name, traced) as call:
            await function(Exchange(context, request_class, name), call)

    return handle
