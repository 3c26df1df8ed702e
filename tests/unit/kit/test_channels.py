"""What a channel of the kit puts up with."""

import asyncio
from contextlib import suppress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tokenloom.kit.channels import open_channel

SLOW_S = 0.4
WAIT_S = 10.0


async def test_a_server_that_is_slow_to_greet_fails_no_call():
    """A busy server answers the connection's first bytes late; calls wait for it."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    relays: set[asyncio.Task] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.add(asyncio.current_task())
        await asyncio.sleep(SLOW_S)
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, forth), pump(back, writer))

    door = await asyncio.start_server(relay, "127.0.0.1", 0)
    host, door_port = door.sockets[0].getsockname()
    channel = open_channel(f"{host}:{door_port}")
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await channel.close()
        door.close()
        await server.stop(0)
        await asyncio.wait_for(asyncio.gather(*relays), WAIT_S)
