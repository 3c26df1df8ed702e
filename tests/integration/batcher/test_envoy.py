"""The real batcher behind the real Envoy with the project's own listener: what only Envoy can say."""

from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from loom.worker.v1 import worker_pb2, worker_pb2_grpc

from tests.integration.batcher.harness import MODEL, mesh
from tests.integration.envoy.harness import Mesh as EnvoyMesh
from tokenloom.contract import headers as names
from tokenloom.contract.headers import RequestHeaders
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.errors import from_rpc_error

BYPASSED = "http.mesh.ext_proc.failure_mode_allowed"


@asynccontextmanager
async def behind_envoy(tmp_path, **settings):
    async with mesh(**settings) as made, AsyncExitStack() as stack:
        envoy = EnvoyMesh(stack, tmp_path)
        places = {
            "worker": [("127.0.0.1", fake.port) for fake in made.workers],
            "batcher": [("127.0.0.1", made.app.port)],
        }
        await envoy.start(workers=0, batchers=0, endpoints=places)
        stub = worker_pb2_grpc.WorkerServiceStub(envoy.channel)

        def generate(request_id="r", **changes):
            now_ms = SystemClock().unix_ms()
            values = {
                "request_id": request_id,
                "arrival_unix_ms": now_ms,
                "deadline_unix_ms": now_ms + 60_000,
                "model": MODEL,
                "tenant": "acme",
                "priority": 2,
                "prompt_tokens": 3,
                "max_new_tokens": 1,
                "prefix": (0x3736353433323130,),
            }
            metadata = RequestHeaders(**(values | changes)).encode()
            request = worker_pb2.GenerateRequest(request_id=request_id, prompt_token_ids=[1, 2, 3])
            return stub.Generate(request, metadata=metadata)

        yield made, generate, envoy


async def tokens(call):
    return [token for response in [r async for r in call] for token in response.tokens.token_ids]


async def test_a_call_goes_to_the_picked_worker_and_its_usage_comes_back(tmp_path):
    async with behind_envoy(tmp_path, workers=2, free=0) as (made, generate, envoy):
        chosen = made.workers[1]
        await chosen.say(1)
        call = generate("a")
        assert await tokens(call) == [7]
        (seen,) = chosen.calls
        assert seen[names.LEASE].startswith("batcher-test-")
        assert seen[names.DESTINATION] == chosen.endpoint
        assert int(seen[names.QUEUED_MS]) >= 0
        assert names.PREFIX_BIN not in seen
        state = await made.until(lambda state: state.counters.completed == 1)
        assert (state.tenants[0].served_prompt_tokens, state.tenants[0].served_generated_tokens) == (3, 1)
        assert state.counters.served_elsewhere == 0
        assert await envoy.stat(BYPASSED) == 0


async def test_a_request_may_be_held_past_envoys_message_timeout(tmp_path):
    async with behind_envoy(tmp_path, free=0) as (made, generate, envoy):
        call = generate("a")
        await made.until(lambda state: state.queues and state.queues[0].oldest_wait_ms > 1_500)
        await made.workers[0].say(1)
        assert await tokens(call) == [7]
        assert int(made.workers[0].calls[0][names.QUEUED_MS]) > 1_400
        assert await envoy.stat(BYPASSED) == 0


async def test_a_refusal_reaches_the_gateway_with_its_details(tmp_path):
    async with behind_envoy(tmp_path, free=0, queue_depth_max=1, tenant_share=1.0) as (made, generate, _):
        held = generate("a")
        await made.until(lambda state: state.queues)
        call = generate("b")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tokens(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_rpc_error(caught.value)
        assert (error.reason, error.metadata["limit"], error.retry_after_s) == ("QUEUE_FULL", "1", 1.0)
        assert error.message == caught.value.details()
        headers = dict(await call.trailing_metadata()) | dict(await call.initial_metadata())
        assert headers[names.DROPPED_REASON] == "rejected-saturated"
        held.cancel()


async def test_a_malformed_request_is_an_invalid_argument(tmp_path):
    async with behind_envoy(tmp_path, free=1) as (made, _, envoy):
        stub = worker_pb2_grpc.WorkerServiceStub(envoy.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tokens(stub.Generate(worker_pb2.GenerateRequest()))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).metadata == {"field": names.REQUEST_ID}
        assert made.workers[0].calls == []


async def test_a_caller_that_leaves_is_out_of_the_queue(tmp_path):
    async with behind_envoy(tmp_path, free=0) as (made, generate, _):
        call = generate("a")
        await made.until(lambda state: state.queues)
        call.cancel()
        state = await made.until(lambda state: not state.queues)
        assert state.counters.cancelled == 1


async def test_a_caller_that_leaves_a_worker_ends_its_lease(tmp_path):
    async with behind_envoy(tmp_path, free=1) as (made, generate, _):
        made.workers[0].release.clear()
        call = generate("a")
        await made.until(lambda state: state.lease_count == 1)
        call.cancel()
        state = await made.until(lambda state: state.lease_count == 0)
        assert (len(state.queues), state.counters.dispatched) == (0, 1)


async def test_a_call_that_a_full_worker_refused_is_counted_where_it_ran(tmp_path):
    async with behind_envoy(tmp_path, workers=2, free=0) as (made, generate, _):
        full, other = made.workers
        full.full = True
        await full.say(1)
        assert await tokens(generate("a")) == [7]
        assert (len(full.calls), len(other.calls)) == (1, 1)
        state = await made.until(lambda state: state.counters.completed == 1)
        assert state.counters.served_elsewhere == 1
