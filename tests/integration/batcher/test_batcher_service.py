"""What people and tools see: state, a request's way, drain, health, traces, metrics."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2 as worker
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.integration.batcher.harness import MODEL, PATIENCE_S, mesh, picked, refused
from tokenloom.kit import telemetry
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import from_rpc_error


async def told(call):
    """Every event of a WatchRequest."""
    async with asyncio.timeout(PATIENCE_S):
        events = []
        while event := await call.read():
            events.append(event)
        return events


def kinds(events):
    return [event.WhichOneof("event") for event in events]


async def test_a_watcher_sees_its_place_move_and_the_dispatch():
    async with mesh(free=0) as made:
        ahead = await made.hold("ahead", arrival_unix_ms=1000)
        mine = await made.hold("mine", arrival_unix_ms=2000, priority=inference_pb2.PRIORITY_STANDARD)
        call = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="mine"))
        async with asyncio.timeout(PATIENCE_S):
            first = await call.read()
            assert (first.queued.position, first.queued.priority) == (1, inference_pb2.PRIORITY_STANDARD)
            await ahead.end()
            second = await call.read()
            assert second.queued.position == 0
        await made.workers[0].say(1)
        (last,) = await told(call)
        assert last.dispatched.endpoint == made.workers[0].endpoint
        picked(await mine.answer())
        await mine.end()


async def test_a_watcher_may_come_before_its_request():
    async with mesh(free=1) as made:
        call = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a"))
        events = asyncio.create_task(told(call))
        async with asyncio.timeout(PATIENCE_S):
            while not made.app._driver.watchers:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        exchange = await made.open("a")
        picked(await exchange.answer())
        assert kinds(await events) == ["dispatched"]
        await exchange.end()


async def test_a_watcher_sees_the_model_being_loaded():
    async with mesh(free=0) as made:
        await made.workers[0].say(0, state=worker.MODEL_STATE_LOADING, progress=0.25)
        held = await made.hold("a")
        call = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a"))
        async with asyncio.timeout(PATIENCE_S):
            events = [await call.read(), await call.read()]
        assert kinds(events) == ["queued", "loading"]
        assert (events[1].loading.endpoint, events[1].loading.progress) == (made.workers[0].endpoint, 0.25)
        call.cancel()
        await held.end()


async def test_a_watcher_sees_a_refusal_also_a_moment_too_late():
    async with mesh(free=0) as made:
        held = await made.hold("a", timeout_s=0.4)
        events = await told(made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a")))
        assert kinds(events) == ["queued", "refused"]
        assert events[-1].refused.reason == "DEADLINE_UNREACHABLE"
        refused(await held.answer())
        (late,) = await told(made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a")))
        assert late.refused.reason == "DEADLINE_UNREACHABLE"


async def test_a_watcher_of_a_request_whose_caller_left_is_told_so():
    async with mesh(free=0) as made:
        held = await made.hold("a")
        call = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a"))
        async with asyncio.timeout(PATIENCE_S):
            await call.read()
        held.call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(call)
        assert from_rpc_error(caught.value).reason == "REQUEST_NOT_FOUND"


async def test_an_unknown_request_is_not_found_after_a_second():
    async with mesh(free=0) as made:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(made.stub.WatchRequest(pb.WatchRequestRequest(request_id="nobody")))
        error = from_rpc_error(caught.value)
        assert (error.reason, error.metadata) == ("REQUEST_NOT_FOUND", {"request_id": "nobody"})
        assert 0.9 < loop.time() - begun < 5


async def test_watchers_are_bounded_and_a_watcher_that_leaves_makes_room():
    async with mesh(free=0, watchers_max=1) as made:
        held = await made.hold("a")
        first = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a"))
        async with asyncio.timeout(PATIENCE_S):
            await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a")))
        assert from_rpc_error(caught.value).reason == "QUEUE_FULL"
        first.cancel()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                again = made.stub.WatchRequest(pb.WatchRequestRequest(request_id="a"))
                try:
                    assert (await again.read()).HasField("queued")
                    break
                except grpc.aio.AioRpcError:
                    continue
        again.cancel()
        await held.end()


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("WatchRequest", pb.WatchRequestRequest(), "request_id"),
        ("WatchState", pb.WatchStateRequest(interval_ms=19), "interval_ms"),
        ("WatchState", pb.WatchStateRequest(interval_ms=60_001), "interval_ms"),
    ],
)
async def test_a_bad_question_names_the_field(method, request_, field):
    async with mesh(free=0) as made:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(getattr(made.stub, method)(request_))
        error = from_rpc_error(caught.value)
        assert (caught.value.code(), error.violations[0][0]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_the_state_shows_queues_workers_and_leases():
    async with mesh(free=1) as made:
        runs = await made.open("runs")
        picked(await runs.answer())
        waits = await made.hold("waits", priority=inference_pb2.PRIORITY_BATCH, prompt_tokens=33)
        state = await made.state()
        (queue,) = state.queues
        assert (queue.model_version, queue.depth, queue.prompt_tokens) == (MODEL, 1, 33)
        assert dict(queue.depth_by_priority) == {"batch": 1}
        (shown,) = state.workers
        assert (shown.endpoint, shown.alive, shown.leases) == (made.workers[0].endpoint, True, 1)
        (model,) = shown.models
        assert (model.state, model.free_sequences, model.free_blocks) == ("ready", 0, 9998)
        assert state.counters.dispatched == 1
        await runs.end()
        picked(await waits.answer())
        await waits.end()


async def test_drain_refuses_new_requests_and_places_those_held():
    async with mesh(free=0) as made:
        held = await made.hold("held")
        assert (await made.stub.Drain(pb.DrainRequest())).remaining == 1
        error, _ = refused(await (await made.open("new")).answer())
        assert (error.reason, error.retriable) == ("DRAINING", True)
        assert made.app.readiness() == "draining"
        await made.workers[0].say(1)
        picked(await held.answer())
        await held.end()


async def test_a_drain_ends_when_the_last_held_request_is_placed_or_leaves():
    async with mesh(free=0) as made:
        placed, leaves = await made.hold("placed"), await made.hold("leaves")
        draining = asyncio.create_task(made.app.drain(PATIENCE_S))
        await made.until(lambda state: state.draining)
        assert not draining.done()
        await made.workers[0].say(1)
        picked(await placed.answer())
        leaves.call.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await draining
        await placed.end()


async def test_what_still_waits_at_the_end_of_the_drain_is_refused_not_dropped():
    async with mesh(free=0) as made:
        held = await made.hold("a")
        await made.app.drain(0.05)
        closing = asyncio.create_task(made.app.close())
        error, _ = refused(await held.answer())
        assert error.reason == "DRAINING"
        await closing


async def test_health_answers_the_names_that_endpoint_pickers_are_asked_by():
    async with mesh(free=0) as made:
        channel = open_channel(f"127.0.0.1:{made.app.health_port}")
        stub = health_pb2_grpc.HealthStub(channel)

        async def ask(name):
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        ready = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
        for name in (*ready, "liveness"):
            assert await ask(name) == health_pb2.HealthCheckResponse.SERVING
        await made.app.drain(0)
        for name in ready:
            assert await ask(name) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await ask("liveness") == health_pb2.HealthCheckResponse.SERVING
        await channel.close(None)


async def test_queue_and_pick_are_children_of_the_span_in_the_streams_metadata(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with mesh(free=1, queue_depth_max=1, tenant_share=1.0) as made:
        placed = await made.open("placed", metadata=[("traceparent", parent)])
        endpoint, added = picked(await placed.answer())
        held = await made.hold("held", metadata=[("traceparent", parent)])
        full = await made.open("full", metadata=[("traceparent", parent)])
        refused(await full.answer())
        held.call.cancel()
        await made.until(lambda state: state.counters.cancelled == 1)
        await placed.end()
    spans = {(s.name, s.attributes.get("loom.request_id")): s for s in exporter.get_finished_spans()}
    assert set(spans) == {("queue", "placed"), ("pick", None), ("queue", "full"), ("queue", "held")}
    for span in spans.values():
        assert trace.format_trace_id(span.context.trace_id) == "0af7651916cd43dd8448eb211c80319c"
        assert trace.format_span_id(span.parent.span_id) == "b7ad6b7169203331"
    pick, queue = spans["pick", None], spans["queue", "placed"]
    assert pick.attributes["loom.endpoint"] == endpoint
    assert pick.attributes["loom.lease"] == added["x-loom-lease"]
    assert queue.start_time <= pick.start_time <= pick.end_time == queue.end_time
    assert spans["queue", "full"].attributes["error.type"] == "QUEUE_FULL"
    assert not spans["queue", "held"].status.is_ok


async def test_metrics_count_outcomes_and_show_gauges():
    async with mesh(free=1, queue_depth_max=1, tenant_share=1.0, tenant_weights={"acme": 2.0}) as made:

        def read(name, **labels):
            return made.app._registry.get_sample_value(f"tokenloom_batcher_{name}", labels)

        def requests(outcome, reason=""):
            return read("requests_total", outcome=outcome, reason=reason, band="standard")

        placed = await made.open("placed", tenant="acme")
        picked(await placed.answer())
        held = await made.hold("held")
        refused(await (await made.open("full")).answer())
        assert (requests("dispatched"), requests("refused", "QUEUE_FULL")) == (1, 1)
        assert read("queue_size", band="standard") == read("leases") == 1
        assert read("queue_duration_seconds_count", band="standard") == 1
        assert read("workers", state="alive") == read("pool_saturation") == 1
        held.call.cancel()
        await made.until(lambda state: state.counters.cancelled == 1)
        assert requests("cancelled") == 1
        await placed.response_trailers(worker.Usage(prompt_tokens=9, completion_tokens=3))
        await placed.end()
        await made.until(lambda state: state.counters.completed == 1)
        assert read("served_tokens_total", tenant="acme", kind="completion") == 3
