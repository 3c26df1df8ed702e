"""What a caller may see of its waiting request: the gateway asks every batcher, and listens to one."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from loom.batcher.v1 import batcher_pb2 as pb
from loom.batcher.v1 import batcher_pb2_grpc as rpc
from pydantic import ValidationError

from services.gateway.adapters.waiting import RequestWatch
from services.gateway.settings import GatewaySettings
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error
from tokenloom.kit.server import GrpcServer

SERVICE = pb.DESCRIPTOR.services_by_name["BatcherService"]


class Replica:
    """A batcher that knows some requests, or only fails."""

    def __init__(self, *known, error="REQUEST_NOT_FOUND", forever=False):
        self.known, self.error, self.forever = known, error, forever
        self.left = asyncio.Event()

    async def WatchRequest(self, request, call):
        if request.request_id not in self.known:
            raise CallError(self.error, "not here")
        try:
            yield pb.WatchRequestResponse(queued=pb.Queued(position=3))
            yield pb.WatchRequestResponse(loading=pb.Loading(endpoint="w1", progress=0.5))
            if self.forever:
                await asyncio.Event().wait()
            yield pb.WatchRequestResponse(dispatched=pb.Dispatched(endpoint="w1"))
        finally:
            self.left.set()


class Found(RequestWatch):
    """With the addresses of tests instead of a name's."""

    def __init__(self, addresses):
        super().__init__("dns:///batcher:9002")
        self.addresses = addresses

    async def _replicas(self):
        return self.addresses


@asynccontextmanager
async def door(*replicas, gone=0):
    """A client of a gateway's door, with these batchers behind it and some more that nobody serves."""
    servers, addresses = [], [f"127.0.0.1:{1 + number}" for number in range(gone)]
    for replica in replicas:
        server = GrpcServer("127.0.0.1", 0)
        server.add(SERVICE, replica)
        addresses.append(f"127.0.0.1:{await server.start()}")
        servers.append(server)
    front = GrpcServer("127.0.0.1", 0)
    front.add(SERVICE, Found(addresses))
    channel = open_channel(f"127.0.0.1:{await front.start()}")
    try:
        yield rpc.BatcherServiceStub(channel)
    finally:
        await channel.close(None)
        for server in (front, *servers):
            await server.stop(0)


async def kinds(stub, request_id):
    call = stub.WatchRequest(pb.WatchRequestRequest(request_id=request_id), timeout=20)
    return [message.WhichOneof("event") async for message in call]


async def refused(stub, request_id):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await kinds(stub, request_id)
    return from_rpc_error(caught.value)


async def test_the_replica_that_holds_the_request_is_listened_to_to_its_end():
    async with door(Replica("other"), Replica("mine"), gone=1) as stub:
        assert await kinds(stub, "mine") == ["queued", "loading", "dispatched"]


async def test_a_request_that_no_replica_knows_is_not_found_even_if_one_is_away():
    async with door(Replica(), Replica(), gone=1) as stub:
        assert (await refused(stub, "mine")).reason == "REQUEST_NOT_FOUND"


async def test_without_any_batcher_the_service_is_unavailable():
    async with door(gone=1) as stub:
        assert (await refused(stub, "mine")).reason == "SERVICE_UNAVAILABLE"


async def test_a_caller_that_leaves_ends_the_watch():
    replica = Replica("mine", forever=True)
    async with door(replica) as stub:
        call = stub.WatchRequest(pb.WatchRequestRequest(request_id="mine"), timeout=20)
        assert (await call.read()).WhichOneof("event") == "queued"
        call.cancel()
        await asyncio.wait_for(replica.left.wait(), 10)


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_a_request_id_out_of_bounds_is_named(request_id):
    async with door(Replica()) as stub:
        error = await refused(stub, request_id)
        assert (error.reason, error.violations[0][0]) == ("FIELD_INVALID", "request_id")


async def test_nothing_else_of_the_batcher_can_be_called_there():
    async with door(Replica()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetState(pb.GetStateRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("target", ["batcher", "dns:///batcher", "batcher:http", ":9002"])
def test_a_target_without_host_or_port_is_refused(target):
    with pytest.raises(ValidationError, match="batcher_target"):
        GatewaySettings(batcher_target=target)
