"""The bench's own HTTP/2 client, against gRPC's server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from tokenloom.kit.errors import CallError, status_proto
from tools.bench_batcher_load import refusal_of
from tools.bench_batcher_wire import Connection, WireError, connect, header_block

WAIT_S = 20.0
REFUSED = CallError("QUEUE_FULL", "the queue is full: ask again later", retry_after_s=1.0)


class _Service(grpc.GenericRpcHandler):
    """Answers with as many messages as the request has bytes; each says how many metadata came."""

    def __init__(self, message: bytes = b"m" * 40) -> None:
        self.message = message
        self.seen: list[dict[str, str | bytes]] = []
        self.go = asyncio.Event()
        self.go.set()
        self._came = asyncio.Condition()

    async def reached(self, count: int) -> None:
        """So many calls came."""
        async with asyncio.timeout(WAIT_S), self._came:
            await self._came.wait_for(lambda: len(self.seen) >= count)

    def service(self, details):
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            self.seen.append(dict(context.invocation_metadata()))
            async with self._came:
                self._came.notify_all()
            await self.go.wait()
            if request == b"refuse":
                status = status_proto(REFUSED)
                metadata = (("grpc-status-details-bin", status.SerializeToString()),)
                context.set_trailing_metadata(metadata)
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, status.message)
            for _ in request:
                yield self.message

        return grpc.unary_stream_rpc_method_handler(answer)


@asynccontextmanager
async def _served(service: _Service, **options: int) -> AsyncIterator[Connection]:
    server = grpc.aio.server(options=[(f"grpc.{name}", value) for name, value in options.items()])
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection = await connect(f"127.0.0.1:{port}")
    try:
        yield connection
    finally:
        connection.close()
        await server.stop(0)


def _block(*more: tuple[str, str | bytes]) -> bytes:
    pseudo = ((":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "localhost"))
    return header_block([*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), *more])


async def _ask(connection: Connection, request: bytes, *more: tuple[str, str | bytes]):
    """(messages, last fields)."""
    messages: list[bytes] = []
    call = connection.start(_block(*more), request, messages.append)
    return messages, await asyncio.wait_for(call.ended, WAIT_S)


async def test_messages_come_one_by_one_and_the_call_ends_well():
    async with _served(_Service()) as connection:
        messages, fields = await _ask(connection, b"123")
    assert messages == [b"m" * 40] * 3
    assert refusal_of(fields) == ""


async def test_headers_arrive_as_they_were_given():
    service = _Service()
    long = "x" * 3000
    async with _served(service) as connection:
        await _ask(connection, b"1", ("x-loom-tenant", "a"), ("x-long", long), ("x-some-bin", b"\0\1\2\xff"))
    assert service.seen[0]["x-loom-tenant"] == "a"
    assert service.seen[0]["x-long"] == long
    assert service.seen[0]["x-some-bin"] == b"\0\1\2\xff"


async def test_a_message_longer_than_a_frame_is_put_together():
    service = _Service(bytes(range(256)) * 400)
    async with _served(service) as connection:
        messages, _ = await _ask(connection, b"12")
    assert messages == [service.message] * 2


async def test_a_refusal_has_its_reason():
    async with _served(_Service()) as connection:
        messages, fields = await _ask(connection, b"refuse")
    assert messages == []
    assert refusal_of(fields) == "QUEUE_FULL"


async def test_more_calls_than_the_server_takes_wait_their_turn():
    service = _Service()
    service.go.clear()
    async with _served(service, max_concurrent_streams=3) as connection:
        # Before the server has told its bound a client does not know it.
        service.go.set()
        await _ask(connection, b"1")
        service.go.clear()
        asked = [asyncio.create_task(_ask(connection, b"12")) for _ in range(10)]
        await service.reached(4)
        assert len(service.seen) == 4
        service.go.set()
        answers = await asyncio.gather(*asked)
    assert [len(messages) for messages, _ in answers] == [2] * 10
    assert {refusal_of(fields) for _, fields in answers} == {""}


async def test_bodies_beyond_the_connections_window_are_sent_as_it_opens():
    async with _served(_Service()) as connection:
        answers = await asyncio.gather(*(_ask(connection, b"1" * 9000) for _ in range(12)))
    assert [len(messages) for messages, _ in answers] == [9000] * 12


async def test_a_lost_connection_fails_the_calls_under_way():
    service = _Service()
    service.go.clear()
    async with _served(service) as connection:
        asked = asyncio.create_task(_ask(connection, b"1"))
        await service.reached(1)
        connection.close()
        with pytest.raises(WireError, match="the connection was lost"):
            await asked


async def test_a_request_that_fits_no_frame_is_refused():
    async with _served(_Service()) as connection:
        with pytest.raises(WireError, match="16384 bytes"):
            connection.start(_block(), b"1" * 16_384, lambda _: None)
