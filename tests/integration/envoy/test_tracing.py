"""W3C trace context through both listeners, and Envoy's own spans."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.integration.envoy.edge_fakes import Gateway
from tests.integration.envoy.harness import WAIT_S, Mesh
from tests.integration.envoy.test_edge_listener import METHOD
from tokenloom.cli.otlp import Receiver
from tokenloom.cli.spans import Span
from tokenloom.cli.traces import read_recent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{CALLER}-01")
UNTRACED = ("traceparent", f"00-{TRACE[::-1]}-{CALLER}-00")
"""A caller who has decided that this trace is not kept."""


@pytest.fixture
async def collector(tmp_path: Path):
    async with AsyncExitStack() as stack:
        receiver = Receiver(tmp_path / "traces.jsonl")
        stack.push_async_callback(receiver.close)
        yield await receiver.start(0), tmp_path / "traces.jsonl"


@pytest.fixture
async def gateway():
    async with AsyncExitStack() as stack:
        yield await Gateway().start(stack)


async def spans(path: Path, count: int) -> list[Span]:
    """The spans of the one trace there is, once there are `count`."""
    async with asyncio.timeout(WAIT_S):
        while True:
            traces = list(read_recent(path).values())
            if traces and len(traces[0].spans) >= count:
                return sorted(traces[0].spans, key=lambda s: s.start_ns)
            await asyncio.sleep(0.05)


async def trace_ids(path: Path, until: str) -> set[str]:
    """Every trace that is there once `until` is."""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = set(read_recent(path))
            if until in found:
                return found
            await asyncio.sleep(0.05)


def ids(traceparent: str) -> tuple[str, str, str]:
    _, trace_id, span_id, flags = traceparent.split("-")
    return trace_id, span_id, flags


async def test_the_mesh_span_is_parent_of_the_worker_and_of_the_question_to_the_batcher(
    mesh: Mesh, collector: tuple[int, Path]
):
    port, path = collector
    await mesh.start(endpoints={"otlp": [("127.0.0.1", port)]})
    await mesh.call([TRACEPARENT, ("x-loom-request-id", "r-1")])
    served, asked = await spans(path, 2)
    assert (served.service, served.trace_id, served.parent_id) == ("mesh", TRACE, CALLER)
    assert served.name == "/loom.worker.v1.WorkerService/Generate"
    assert served.attributes["loom.destination"] == mesh.workers[0].address
    assert served.attributes["loom.request_id"] == "r-1"
    assert (asked.service, asked.parent_id) == ("mesh", served.span_id)
    (call,) = mesh.workers[0].of("call")
    assert ids(call["metadata"]["traceparent"]) == (TRACE, served.span_id, "01")
    (opened,) = mesh.batchers[0].of("opened")
    assert ids(opened["traceparent"]) == (TRACE, asked.span_id, "01")


def places(port: int, gateway: Gateway) -> dict[str, list[tuple[str, int]]]:
    """Where the collector and the one gateway are."""
    return {"otlp": [("127.0.0.1", port)], "gateway_grpc": [("127.0.0.1", gateway.grpc_port)]}


@pytest.mark.parametrize("request_id", ["mine", "9b8a7c6d-1111-4222-8333-444455556666"])
async def test_the_edge_begins_a_trace_whatever_the_request_id_looks_like(
    mesh: Mesh, collector: tuple[int, Path], gateway: Gateway, request_id: str
):
    port, path = collector
    await mesh.start(workers=0, batchers=0, endpoints=places(port, gateway))
    call = mesh.open(mesh.ports.edge).unary_unary(METHOD)
    await call(b"", metadata=(("x-request-id", request_id),))
    (root,) = await spans(path, 1)
    assert (root.service, root.parent_id, root.name) == ("edge", "", f"POST {METHOD}")
    assert request_id in root.attributes.values()
    assert ids(gateway.seen[0]["traceparent"]) == (root.trace_id, root.span_id, "01")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_the_edge_decides_for_a_request_unless_its_caller_has_decided(
    mesh: Mesh, collector: tuple[int, Path], gateway: Gateway, ratio: float
):
    port, path = collector
    await mesh.start(workers=0, batchers=0, endpoints=places(port, gateway), trace_ratio=ratio)
    call = mesh.open(mesh.ports.edge).unary_unary(METHOD)
    for metadata in ([], [UNTRACED], [TRACEPARENT]):
        await call(b"", metadata=metadata)
    undecided, untraced, traced = (ids(seen["traceparent"]) for seen in gateway.seen)
    assert undecided[2] == ("01" if ratio else "00")
    assert (untraced[0], untraced[2]) == (TRACE[::-1], "00")
    assert (traced[0], traced[2]) == (TRACE, "01")
    # Spans leave in the order of the calls: with the last one's, all there will be are there.
    wanted = {undecided[0], TRACE} if ratio else {TRACE}
    assert await trace_ids(path, until=TRACE) == wanted


async def test_the_mesh_follows_what_the_edge_has_decided(mesh: Mesh, collector: tuple[int, Path]):
    port, path = collector
    await mesh.start(endpoints={"otlp": [("127.0.0.1", port)]})
    await mesh.call([UNTRACED])
    await mesh.call([TRACEPARENT])
    for seen in (
        [call["metadata"]["traceparent"] for call in mesh.workers[0].of("call")],
        [asked["traceparent"] for asked in mesh.batchers[0].of("opened")],
    ):
        assert [(ids(one)[0], ids(one)[2]) for one in seen] == [(TRACE[::-1], "00"), (TRACE, "01")]
    assert await trace_ids(path, until=TRACE) == {TRACE}
