"""The ext_proc stream as a stream: bytes that are no message, and traces that nobody keeps."""

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext

from services.batcher.adapters import spans
from tests.integration.batcher.harness import PROCESS, http_headers, mesh, picked, request_headers
from tokenloom.kit.errors import from_rpc_error

GARBAGE = b"\xff\xff\xff"


async def test_bytes_that_are_no_message_are_the_callers_mistake():
    async with mesh(free=1) as made:
        call = made.channel.stream_stream(PROCESS)()
        await call.write(GARBAGE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).reason == "REQUEST_MALFORMED"


@pytest.mark.parametrize("free", [1, 0], ids=["placed", "held"])
async def test_a_stream_that_turns_to_garbage_gives_its_place_back(free):
    async with mesh(free=free) as made:
        call = made.channel.stream_stream(PROCESS)()
        first = ext.ProcessingRequest(request_headers=http_headers(request_headers("a")))
        await call.write(first.SerializeToString())
        await call.read()
        await made.until(lambda state: state.lease_count + sum(q.depth for q in state.queues) == 1)
        await call.write(GARBAGE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await made.until(lambda state: state.lease_count + sum(q.depth for q in state.queues) == 0)


@pytest.mark.parametrize(("flags", "recorded"), [("00", []), ("01", ["a"])])
async def test_a_trace_that_is_not_kept_costs_no_spans(monkeypatch, flags, recorded):
    seen = []
    monkeypatch.setattr(spans, "record", lambda stay, *_: seen.append(stay.request.request_id))
    parent = f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}"
    async with mesh(free=1) as made:
        exchange = await made.open("a", metadata=[("traceparent", parent)])
        picked(await exchange.answer())
        await exchange.end()
        await made.until(lambda state: state.counters.completed == 1)
    assert seen == recorded
