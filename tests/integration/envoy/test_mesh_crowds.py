"""Many streams on one connection: what the limits of HTTP/2 must not do to them."""

import asyncio
from collections import Counter

import grpc

from tests.integration.envoy.harness import GENERATE, Mesh

FAILED_OPEN = "http.mesh.ext_proc.failure_mode_allowed"
DEFAULT_OUTBOUND_FRAMES_MAX = 10_000
WAVE = 50


async def drain(call: grpc.aio.UnaryStreamCall) -> int:
    """How many tokens a call brings; raises when it fails."""
    return len([token async for token in call])


async def hold(mesh: Mesh, channel: grpc.aio.Channel, count: int) -> list[grpc.aio.UnaryStreamCall]:
    """Calls that the batcher holds.

    They come in waves: the batcher has a second to answer each, and this one is slow.
    """
    arrived = len(mesh.batchers[0].of("request_headers"))
    stub = channel.unary_stream(GENERATE)
    calls: list[grpc.aio.UnaryStreamCall] = []
    while len(calls) < count:
        wave = min(WAVE, count - len(calls))
        calls += [stub(b'{"tokens": 1}') for _ in range(wave)]
        await mesh.batchers[0].saw("request_headers", arrived + len(calls))
    return calls


async def test_1400_requests_held_on_one_connection_all_wait_for_the_batcher(mesh: Mesh):
    await mesh.start(hold=True)
    calls = await hold(mesh, mesh.channel, 1400)
    assert await mesh.stat("http.mesh.downstream_rq_active") == 1400
    assert not any(w.of("call") for w in mesh.workers)
    mesh.batchers[0].tell(release=True)
    tokens = await asyncio.gather(*(drain(call) for call in calls))
    assert Counter(tokens) == {1: 1400}
    assert len(mesh.workers[0].of("call")) == 1400
    assert await mesh.stat(FAILED_OPEN) == 0


async def test_a_gateway_that_vanishes_with_1400_held_requests_leaves_the_others_held(mesh: Mesh):
    await mesh.start(hold=True)
    vanishing, staying = mesh.open(mesh.ports.mesh), mesh.open(mesh.ports.mesh)
    (held,) = await hold(mesh, staying, 1)
    await hold(mesh, vanishing, 1400)
    await vanishing.close()
    await mesh.batchers[0].saw("ended", 1400)
    assert len(mesh.batchers[0].of("ended")) == 1400
    mesh.batchers[0].tell(release=True)
    assert await drain(held) == 1
    assert await mesh.stat(FAILED_OPEN) == 0


async def test_a_wave_of_callers_that_leave_at_once_ends_no_other_stream(mesh: Mesh):
    await mesh.start(hold=True)
    (held,) = await hold(mesh, mesh.channel, 1)
    for call in await hold(mesh, mesh.channel, 600):
        call.cancel()
    await mesh.batchers[0].saw("ended", 600)
    mesh.batchers[0].tell(release=True)
    assert await drain(held) == 1


async def test_a_gateway_that_pauses_loses_none_of_its_streams(mesh: Mesh):
    def small_buffers(resource: dict, name: str) -> None:
        # The kernel would otherwise hold megabytes of frames before Envoy has to.
        if name == "mesh":
            option = {"level": 1, "name": 7, "int_value": 8192, "state": "STATE_LISTENING"}
            resource["socket_options"] = [option]

    await mesh.start(change=small_buffers)
    caller = await mesh.fake("caller", mesh.ports.mesh, streams=100, tokens=300, hold_at=0)
    await mesh.workers[0].saw("holding", 100)
    caller.freeze()
    mesh.workers[0].tell(release=True)
    await mesh.workers[0].saw("served", 100)
    await mesh.until("http2.outbound_frames_active", lambda frames: frames > DEFAULT_OUTBOUND_FRAMES_MAX)
    caller.thaw()
    (done,) = await caller.saw("done")
    assert done["whole"] == 100
