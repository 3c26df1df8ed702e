"""Envoy's side of the contract, over real gRPC: hold, pick, refuse, cancel, follow to the end."""

import asyncio

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from loom.worker.v1 import worker_pb2 as worker

from tests.integration.batcher.harness import Exchange, http_headers, mesh, picked, refused, request_headers
from tokenloom.contract import headers as names
from tokenloom.kit.clock import SystemClock


async def test_a_free_worker_is_named_in_the_first_answer():
    async with mesh(free=1) as made:
        exchange = await made.open("a")
        endpoint, added = picked(await exchange.answer())
        assert endpoint == made.workers[0].endpoint
        assert exchange.held_s is None
        assert added[names.QUEUED_MS] == "0"
        assert added[names.LEASE].startswith("batcher-test-")
        (lease,) = (await made.state()).leases
        assert (lease.lease_id, lease.request_id, lease.endpoint) == (added[names.LEASE], "a", endpoint)
        await exchange.end()
        await made.until(lambda state: state.lease_count == 0 and state.counters.completed == 1)


async def test_a_request_is_held_with_one_answer_at_once_and_placed_when_room_is_reported():
    async with mesh(free=0, hold_max_s=30) as made:
        exchange = await made.hold("a")
        assert exchange.held_s == 35.0
        await made.workers[0].say(1)
        endpoint, added = picked(await exchange.answer())
        assert endpoint == made.workers[0].endpoint
        assert int(added[names.QUEUED_MS]) >= 0
        await exchange.end()


async def test_envoy_waits_no_longer_than_the_deadline_and_a_margin():
    async with mesh(free=0) as made:
        exchange = await made.hold("a", timeout_s=5)
        assert 9.0 < exchange.held_s <= 10.0
        await exchange.end()


async def test_requests_are_placed_in_order_of_arrival_over_several_streams():
    async with mesh(free=0) as made:
        deadline = SystemClock().unix_ms() + 60_000
        second = await made.hold("second", arrival_unix_ms=2000, deadline_unix_ms=deadline)
        first = await made.hold("first", arrival_unix_ms=1000, deadline_unix_ms=deadline)
        await made.workers[0].say(1)
        picked(await first.answer())
        assert [lease.request_id for lease in (await made.state()).leases] == ["first"]
        await first.end()
        picked(await second.answer())
        await second.end()


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_caller_that_leaves_while_it_waits_is_out_of_the_queue_at_once(how):
    async with mesh(free=0) as made:
        exchange = await made.hold("a")
        if how == "cancel":
            exchange.call.cancel()
        else:
            await exchange.end()
        state = await made.until(lambda state: state.counters.cancelled == 1)
        assert (len(state.queues), state.lease_count) == (0, 0)
        await made.workers[0].say(1)
        other = await made.open("b")
        picked(await other.answer())
        await other.end()


async def test_a_caller_that_leaves_after_the_pick_ends_its_lease():
    async with mesh(free=1) as made:
        exchange = await made.open("a")
        picked(await exchange.answer())
        exchange.call.cancel()
        state = await made.until(lambda state: state.lease_count == 0)
        assert (state.counters.completed, state.counters.cancelled) == (1, 0)


async def test_an_answer_of_envoys_own_while_a_request_waits_takes_it_out_of_the_queue():
    async with mesh(free=0) as made:
        exchange = await made.hold("a")
        await exchange.send(response_headers=http_headers({":status": "408"}))
        assert (await exchange.answer()).HasField("response_headers")
        await made.until(lambda state: state.counters.cancelled == 1)
        await exchange.end()


async def test_trailers_bring_the_usage_and_the_end_of_the_stream_ends_the_lease():
    async with mesh(free=1) as made:
        exchange = await made.open("a", tenant="acme")
        endpoint, _ = picked(await exchange.answer())
        await exchange.response_headers(endpoint)
        await exchange.response_trailers(
            worker.Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=5)
        )
        assert (await made.state()).lease_count == 1
        await exchange.end()
        state = await made.until(lambda state: state.lease_count == 0)
        (tenant,) = state.tenants
        assert (tenant.name, tenant.served_prompt_tokens, tenant.served_generated_tokens) == ("acme", 6, 5)
        assert state.counters.served_elsewhere == 0


async def test_a_call_that_envoy_moved_is_charged_to_the_worker_that_answers():
    async with mesh(workers=2, free=4) as made:
        exchange = await made.open("a")
        endpoint, _ = picked(await exchange.answer())
        (other,) = [fake.endpoint for fake in made.workers if fake.endpoint != endpoint]
        await exchange.response_headers(other)
        state = await made.state()
        assert state.counters.served_elsewhere == 1
        assert state.leases[0].served_by == other
        assert {each.endpoint: each.leases for each in state.workers} == {endpoint: 0, other: 1}
        await exchange.end()


async def test_a_full_queue_is_refused_as_an_error_that_a_gateway_can_read():
    async with mesh(free=0, queue_depth_max=1, tenant_share=1.0) as made:
        held = await made.hold("a")
        exchange = await made.open("b")
        response = await exchange.answer()
        error, added = refused(response)
        assert (error.reason, error.metadata["limit"]) == ("QUEUE_FULL", "1")
        assert error.retry_after_s == pytest.approx(1.0)
        assert added[names.DROPPED_REASON] == "rejected-saturated"
        assert (response.immediate_response.status.code, response.immediate_response.grpc_status.status) == (
            429,
            8,
        )
        assert response.immediate_response.body.decode() == error.message
        await exchange.end()
        await held.end()


async def test_a_deadline_that_passes_in_the_queue_is_refused():
    async with mesh(free=0) as made:
        exchange = await made.open("a", timeout_s=0.3)
        error, added = refused(await exchange.answer())
        assert error.reason == "DEADLINE_UNREACHABLE"
        assert added[names.DROPPED_REASON] == "rejected-ttl-expired"


async def test_a_model_that_nobody_serves_is_refused_after_the_hold():
    async with mesh(workers=0, no_worker_hold_s=0.2) as made:
        error, added = refused(await (await made.hold("a")).answer())
        assert error.reason == "NO_CAPACITY"
        assert added[names.DROPPED_REASON] == "rejected-no-endpoints"


@pytest.mark.parametrize("missing", [names.REQUEST_ID, names.MODEL, names.PROMPT_TOKENS])
async def test_a_request_without_our_headers_is_an_invalid_argument_that_names_the_header(missing):
    async with mesh(free=1) as made:
        headers = request_headers("a")
        del headers[missing]
        exchange = Exchange(made.channel)
        await exchange.send(request_headers=http_headers(headers))
        response = await exchange.answer()
        error, added = refused(response)
        assert response.immediate_response.grpc_status.status == 3
        assert (error.reason, error.metadata) == ("FIELD_INVALID", {"field": missing})
        assert missing in error.message
        assert names.DROPPED_REASON not in added
        assert (await made.state()).counters.arrived == 0


async def test_a_stream_that_ends_before_its_first_message_does_no_harm():
    async with mesh(free=1) as made:
        exchange = Exchange(made.channel)
        await exchange.end()
        assert (await made.state()).counters.arrived == 0


async def test_messages_that_the_batcher_has_no_use_for_are_answered():
    async with mesh(free=1) as made:
        exchange = await made.open("a")
        picked(await exchange.answer())
        await exchange.send(request_body=ext.HttpBody(body=b"x", end_of_stream=True))
        assert (await exchange.answer()).HasField("request_body")
        await exchange.end()


async def test_requests_of_a_lost_worker_are_placed_on_another_when_they_come_again():
    async with mesh(workers=2, free=0) as made:
        lost, other = made.workers
        await lost.say(1)
        deadline = SystemClock().unix_ms() + 60_000
        first = await made.open("a", arrival_unix_ms=1000, deadline_unix_ms=deadline)
        assert picked(await first.answer())[0] == lost.endpoint
        waiting = await made.hold("b", arrival_unix_ms=2000, deadline_unix_ms=deadline)
        await lost.stop()
        await made.until(lambda state: sum(each.alive for each in state.workers) == 1)
        await first.end()
        again = await made.hold("a", arrival_unix_ms=1000, deadline_unix_ms=deadline, attempt=2)
        await other.say(1)
        assert picked(await again.answer())[0] == other.endpoint
        await other.say(2, active=["a"])
        assert picked(await waiting.answer())[0] == other.endpoint
        await again.end()
        await waiting.end()


async def test_a_worker_that_comes_back_is_used_again():
    async with mesh(free=1) as made:
        (fake,) = made.workers
        await fake.stop()
        held = await made.hold("a")
        await fake.start()
        assert picked(await held.answer())[0] == fake.endpoint
        await held.end()


async def test_a_thousand_held_requests_get_their_first_answer_and_all_are_placed():
    async with mesh(free=0) as made:
        held = await asyncio.gather(*(made.hold(f"r{n}", arrival_unix_ms=n) for n in range(1000)))
        state = await made.state()
        assert (state.queues[0].depth, state.counters.arrived) == (1000, 1000)
        await made.workers[0].say(1000)
        assert {picked(await each.answer())[0] for each in held} == {made.workers[0].endpoint}
        await asyncio.gather(*(each.end() for each in held))
        await made.until(lambda state: state.lease_count == 0 and state.counters.completed == 1000)
