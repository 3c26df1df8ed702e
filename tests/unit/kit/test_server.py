"""The kit's server over a real connection: parsing, errors, metadata, cancellation, health, reflection."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loom.batcher.v1 import batcher_pb2 as pb
from loom.batcher.v1 import batcher_pb2_grpc as rpc

from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, field_invalid, from_rpc_error
from tokenloom.kit.server import GrpcServer

SERVICE = pb.DESCRIPTOR.services_by_name["BatcherService"]


class Servicer:
    def __init__(self):
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()
        self.before_first = asyncio.Event()

    async def GetState(self, request, call):
        call.set_initial([("x-initial", "1")])
        call.set_trailing([("x-trailing", "2")])
        return pb.GetStateResponse(state=pb.State(unix_ms=7))

    async def Drain(self, request, call):
        raise ZeroDivisionError("secret detail")

    async def WatchRequest(self, request, call):
        yield pb.WatchRequestResponse()

    async def WatchState(self, request, call):
        if request.interval_ms == 1:
            raise field_invalid(("interval_ms", "must be at least 20"))
        call.set_initial([("x-initial", "1")])
        if request.interval_ms == 2:
            await self.before_first.wait()
        yield pb.WatchStateResponse(state=pb.State(unix_ms=1))
        if request.interval_ms == 3:
            raise CallError("DRAINING", "going away", retry_after_s=1.5)
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


@pytest.fixture
async def mesh():
    servicer = Servicer()
    server = GrpcServer("127.0.0.1", 0)
    server.add(SERVICE, servicer)
    port = await server.start()
    await server.set_serving(True)
    channel = open_channel(f"127.0.0.1:{port}")
    yield servicer, channel, rpc.BatcherServiceStub(channel), server
    await channel.close(None)
    await server.stop(0)


async def test_unary_call_carries_metadata_both_ways(mesh):
    _, _, stub, _ = mesh
    call = stub.GetState(pb.GetStateRequest())
    assert (await call).state.unix_ms == 7
    assert dict(await call.initial_metadata())["x-initial"] == "1"
    assert dict(await call.trailing_metadata())["x-trailing"] == "2"


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x02\xc3\x28"], ids=["no message", "no UTF-8"])
async def test_garbage_bytes_and_invalid_utf8_are_invalid_argument(mesh, garbage):
    _, channel, _, _ = mesh
    call = channel.unary_stream("/loom.batcher.v1.BatcherService/WatchRequest")(garbage)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).reason == "REQUEST_MALFORMED"


async def test_a_defect_is_internal_and_tells_no_detail(mesh, caplog):
    _, _, stub, _ = mesh
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Drain(pb.DrainRequest())
    error = from_rpc_error(caught.value)
    assert error.reason == "INTERNAL"
    assert "secret" not in error.message


async def test_typed_refusal_before_the_first_message(mesh):
    _, _, stub, _ = mesh
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.WatchState(pb.WatchStateRequest(interval_ms=1)):
            pass
    error = from_rpc_error(caught.value)
    assert (error.reason, error.violations) == ("FIELD_INVALID", (("interval_ms", "must be at least 20"),))


async def test_typed_refusal_inside_a_stream_keeps_its_retry_hint(mesh):
    _, _, stub, _ = mesh
    call = stub.WatchState(pb.WatchStateRequest(interval_ms=3))
    first = await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = from_rpc_error(caught.value)
    assert (first.state.unix_ms, error.reason, error.retriable, error.retry_after_s) == (
        1,
        "DRAINING",
        True,
        1.5,
    )


async def test_nothing_is_sent_before_the_first_message(mesh):
    servicer, _, stub, _ = mesh
    call = stub.WatchState(pb.WatchStateRequest(interval_ms=2))
    headers = asyncio.ensure_future(call.initial_metadata())
    done, _ = await asyncio.wait([headers], timeout=0.2)
    assert not done
    servicer.before_first.set()
    assert dict(await headers)["x-initial"] == "1"
    call.cancel()


async def test_cancelling_a_stream_ends_its_handler(mesh):
    servicer, _, stub, _ = mesh
    call = stub.WatchState(pb.WatchStateRequest(interval_ms=9))
    await call.read()
    await servicer.entered.wait()
    call.cancel()
    await asyncio.wait_for(servicer.cancelled.wait(), 5)
    assert servicer.cancelled.is_set()


async def test_health_follows_set_serving(mesh):
    _, channel, _, server = mesh
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(mesh):
    _, channel, _, _ = mesh
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE.full_name, "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_a_taken_port_is_an_os_error(mesh):
    _, _, _, server = mesh
    other = GrpcServer("127.0.0.1", server.port)
    with pytest.raises(OSError, match="in use"):
        await other.start()
