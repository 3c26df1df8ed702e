"""Small stand-ins that the real Envoy talks to: a worker and a batcher, each a process of its own.

    python -m tests.integration.envoy.fakes worker PORT
    python -m tests.integration.envoy.fakes batcher PORT '{"picks": ["127.0.0.1:7001"], "hold": true}'
    python -m tests.integration.envoy.fakes caller PORT '{"streams": 100, "tokens": 1000}'

The third is a gateway's side: many streams on one connection, with a small receive buffer.
Each prints one JSON line for every thing that happens and takes JSON lines on standard input, so that
a test waits for events and never for time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from envoy.type.v3 import http_status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

DESTINATION = "x-gateway-destination-endpoint"
STREAMS_MAX = 100_000
SMALL_BUFFER_BYTES = 8 * 1024
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    # gRPC's default refuses arrivals at random once 1,000 wait to be accepted: a refusal by the batcher
    # is a request that bypasses it.
    ("grpc.server.max_pending_requests", STREAMS_MAX),
    ("grpc.server.max_pending_requests_hard_limit", STREAMS_MAX),
]


def say(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


async def commands():
    """JSON objects from standard input; ends with it."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield json.loads(line)


class Worker(grpc.GenericRpcHandler):
    """Answers any `…/Generate` as the JSON in its request says: tokens, full, hold."""

    def __init__(self, port: int) -> None:
        self.name = f"127.0.0.1:{port}"
        self.health = health.aio.HealthServicer()
        self.release = asyncio.Event()

    def service(self, details):
        if not details.method.endswith("/Generate"):
            return None
        return grpc.unary_stream_rpc_method_handler(self.generate)

    async def generate(self, request: bytes, context):
        ask = json.loads(request)
        seen = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        binary = [k for k, v in context.invocation_metadata() if isinstance(v, bytes)]
        say("call", metadata=seen, binary=binary, bytes=len(request))
        if self.name in ask.get("full", ()):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "WORKER_FULL")
        await context.send_initial_metadata((("x-loom-worker", self.name),))
        tokens = ask.get("tokens", 3)
        for i in range(tokens):
            if i == ask.get("hold_at"):
                say("holding")
                await self.release.wait()
            yield b"token%05d" % i
        context.set_trailing_metadata((("x-loom-usage-bin", b"\x01\x02"),))
        say("served")

    async def obey(self) -> None:
        async for command in commands():
            if "healthy" in command:
                status = health_pb2.HealthCheckResponse
                await self.health.set("", status.SERVING if command["healthy"] else status.NOT_SERVING)
            if command.get("release"):
                self.release.set()


class Batcher(grpc.GenericRpcHandler):
    """An endpoint picker that holds, picks or refuses as told, and says what Envoy tells it."""

    def __init__(self, settings: dict) -> None:
        self.settings = settings
        self.release = asyncio.Event()

    def service(self, details):
        if details.method != "/envoy.service.ext_proc.v3.ExternalProcessor/Process":
            return None
        return grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=ep.ProcessingRequest.FromString,
            response_serializer=ep.ProcessingResponse.SerializeToString,
        )

    async def process(self, requests, context):
        metadata = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        say("opened", traceparent=metadata.get("traceparent", ""))
        try:
            async for request in requests:
                kind = request.WhichOneof("request")
                say(kind, headers=_headers(request, kind))
                if kind == "request_headers":
                    async for response in self.decide():
                        yield response
                elif kind == "response_headers":
                    yield ep.ProcessingResponse(response_headers=ep.HeadersResponse())
                elif kind == "response_trailers":
                    yield ep.ProcessingResponse(response_trailers=ep.TrailersResponse())
        finally:
            say("ended")

    async def decide(self):
        settings = self.settings
        if settings.get("refuse"):
            yield refusal()
            return
        if settings.get("override", True):
            more = ep.ProcessingResponse()
            more.override_message_timeout.FromSeconds(settings.get("override_s", 60))
            yield more
        if settings.get("hold"):
            await self.release.wait()
        yield pick(settings["picks"])

    async def obey(self) -> None:
        async for command in commands():
            if command.get("release"):
                self.release.set()
            self.settings |= command.get("settings", {})


def pick(endpoints: list[str]) -> ep.ProcessingResponse:
    """The answer of an endpoint picker: the same in a header and in dynamic metadata."""
    value = ",".join(endpoints)
    response = ep.ProcessingResponse(request_headers=ep.HeadersResponse())
    mutation = response.request_headers.response.header_mutation
    mutation.set_headers.append(_set(DESTINATION, value))
    mutation.set_headers.append(_set("x-loom-lease", "lease-1"))

    response.dynamic_metadata.update({"envoy.lb": {DESTINATION: value}})
    return response


def refusal() -> ep.ProcessingResponse:
    immediate = ep.ImmediateResponse(body=b"queue full")
    immediate.status.CopyFrom(http_status_pb2.HttpStatus(code=http_status_pb2.TooManyRequests))
    immediate.grpc_status.status = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    immediate.headers.set_headers.append(_set("x-llm-d-request-dropped-reason", "rejected-saturated"))
    return ep.ProcessingResponse(immediate_response=immediate)


def _set(key: str, value: str) -> base_pb2.HeaderValueOption:
    header = base_pb2.HeaderValue(key=key, raw_value=value.encode())
    return base_pb2.HeaderValueOption(header=header, append_action="OVERWRITE_IF_EXISTS_OR_ADD")


def _headers(request: ep.ProcessingRequest, kind: str) -> dict[str, str]:
    part = getattr(request, kind)
    found = part.trailers if kind == "response_trailers" else part.headers
    return {h.key: h.raw_value.decode("latin-1") for h in found.headers}


async def call_many(port: str, streams: int, tokens: int, hold_at: int) -> None:
    """Read `streams` streams of `tokens` tokens, held at one of them, and say how many were whole."""
    options = [("grpc.tcp_receive_buffer_size", SMALL_BUFFER_BYTES)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = channel.unary_stream("/loom.worker.v1.WorkerService/Generate")
        say("ready")
        ask = json.dumps({"tokens": tokens, "hold_at": hold_at}).encode()

        async def read() -> bool:
            try:
                return len([t async for t in stub(ask)]) == tokens
            except grpc.aio.AioRpcError:
                return False

        whole = await asyncio.gather(*(read() for _ in range(streams)))
        say("done", whole=sum(whole))


async def main() -> None:
    kind, port, *rest = sys.argv[1:]
    if kind == "caller":
        await call_many(port, **json.loads(rest[0]))
        return
    server = grpc.aio.server(options=SERVER_OPTIONS)
    if kind == "worker":
        servant = Worker(int(port))
        health_pb2_grpc.add_HealthServicer_to_server(servant.health, server)
        await servant.health.set("", health_pb2.HealthCheckResponse.SERVING)
    else:
        servant = Batcher(json.loads(rest[0]) if rest else {})
    server.add_generic_rpc_handlers((servant,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    say("ready")
    await servant.obey()
    # Standard input ended: so did the test.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
