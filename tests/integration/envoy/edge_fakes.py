"""A gateway made of one gRPC and one HTTP server in the test's own loop, and a caller that speaks h2c."""

from __future__ import annotations

import asyncio
import json
import struct
from contextlib import AsyncExitStack, suppress

import grpc
from aiohttp import web

from tests.integration.envoy.harness import WAIT_S


class Gateway:
    """Echoes what it was sent: the gRPC side as JSON bytes, the HTTP side as JSON or as SSE."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.status = 200
        """Of the HTTP side's answers."""
        self.code = grpc.StatusCode.OK
        """Of the gRPC side's answers."""
        self.release = asyncio.Event()
        self.left = asyncio.Event()
        """A caller went away in the middle of an answer."""
        self.grpc_port = 0
        self.http_port = 0

    async def start(self, stack: AsyncExitStack) -> Gateway:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((_Echo(self),))
        self.grpc_port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0)
        app = web.Application()
        app.router.add_route("*", "/v1/stream", self._stream)
        app.router.add_route("*", "/{path:.*}", self._echo)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.http_port = runner.addresses[0][1]
        return self

    async def _echo(self, request: web.Request) -> web.Response:
        self.seen.append({k.lower(): v for k, v in request.headers.items()})
        content = {"path": request.path, "body": await request.text()}
        return web.json_response(content, status=self.status)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        try:
            await asyncio.wait_for(self.release.wait(), WAIT_S)
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def service(self, details):
        if not details.method.startswith("/loom."):
            return None

        async def echo(request: bytes, context) -> bytes:
            metadata = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
            self._gateway.seen.append(metadata)
            if self._gateway.code is not grpc.StatusCode.OK:
                await context.abort(self._gateway.code, "as the test wants it")
            return json.dumps({"method": details.method, "bytes": len(request)}).encode()

        return grpc.unary_unary_rpc_method_handler(echo)


async def h2c_post(port: int, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Every DATA byte of the answer to one POST over HTTP/2 with prior knowledge.

    Just enough of the protocol: literal headers on the way out, and on the way in only frames are told
    apart, because what matters is that Envoy answers in frames at all.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    pseudo = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    block = b"".join(
        b"\x00" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode()
        for k, v in (pseudo | headers).items()
    )
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
    writer.write(_frame(1, 4, 1, block) + _frame(0, 1, 1, body))
    data = b""
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                head = await reader.readexactly(9)
                length = int.from_bytes(head[:3], "big")
                kind, flags = head[3], head[4]
                payload = await reader.readexactly(length)
                if kind == 0:
                    data += payload
                if kind in (0, 1) and flags & 1:
                    return data
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload
