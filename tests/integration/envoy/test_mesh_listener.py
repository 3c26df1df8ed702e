"""What Envoy does with a request on the mesh listener, and what it tells the batcher."""

import asyncio
from collections import Counter

import grpc

from tests.integration.envoy.harness import Mesh

FAILED_OPEN = "http.mesh.ext_proc.failure_mode_allowed"
OK = grpc.StatusCode.OK


async def test_the_named_worker_gets_the_call(mesh: Mesh):
    await mesh.start()
    named = mesh.workers[1]
    mesh.batchers[0].tell(settings={"picks": [named.address]})
    # The setting is in force once the batcher has answered a call with it.
    await mesh.call()
    answers = await mesh.calls(20)
    assert {a.worker for a in answers} == {named.address}
    assert await mesh.stat(FAILED_OPEN) == 0


async def test_the_batcher_sees_headers_trailers_and_the_end_of_a_request(mesh: Mesh):
    await mesh.start()
    batcher = mesh.batchers[0]
    held = asyncio.create_task(mesh.call(hold_at=1))
    await mesh.workers[0].saw("holding")
    (headers,) = await batcher.saw("response_headers")
    assert headers["headers"]["x-loom-worker"] == mesh.workers[0].address
    assert not batcher.of("ended"), "the ext_proc stream ended before the request did"
    mesh.workers[0].tell(release=True)
    assert (await held).code is OK
    (trailers,) = await batcher.saw("response_trailers")
    assert trailers["headers"]["x-loom-usage-bin"] == "AQI"
    await batcher.saw("ended")


async def test_a_caller_that_leaves_ends_the_ext_proc_stream_and_the_call(mesh: Mesh):
    await mesh.start(hold=True)
    call = mesh.channel.unary_stream("/loom.worker.v1.WorkerService/Generate")(b"{}")
    await mesh.batchers[0].saw("request_headers")
    call.cancel()
    await mesh.batchers[0].saw("ended")
    assert not mesh.workers[0].of("call")


async def test_a_request_is_held_longer_than_the_message_timeout(mesh: Mesh):
    await mesh.start(hold=True)
    held = asyncio.create_task(mesh.call())
    await mesh.batchers[0].saw("request_headers")
    # Real time on purpose: longer than message_timeout, which is what must not end the hold.
    await asyncio.sleep(1.6)
    assert not any(w.of("call") for w in mesh.workers)
    mesh.batchers[0].tell(release=True)
    answer = await held
    assert (answer.code, answer.worker) == (OK, mesh.workers[0].address)
    assert await mesh.stat(FAILED_OPEN) == 0


async def test_a_killed_worker_fails_none_of_200_calls_although_it_is_named(mesh: Mesh):
    await mesh.start()
    assert (await mesh.call()).worker == mesh.workers[0].address
    await mesh.workers[0].kill()
    answers = await mesh.calls(200)
    assert Counter((a.code, a.worker, len(a.tokens)) for a in answers) == {
        (OK, mesh.workers[1].address, 3): 200
    }


async def test_a_killed_batcher_fails_no_call_and_both_workers_serve(mesh: Mesh):
    await mesh.start(hold=True)
    held = asyncio.create_task(mesh.calls(100))
    await mesh.batchers[0].saw("request_headers", 100)
    await mesh.batchers[0].kill()
    answers = await held + await mesh.calls(100)
    assert Counter(a.code for a in answers) == {OK: 200}
    served = Counter(a.worker for a in answers)
    assert min(served[w.address] for w in mesh.workers) >= 20, served


async def test_of_two_batchers_the_living_one_is_asked(mesh: Mesh):
    await mesh.start(batchers=2)
    await mesh.batchers[0].kill()
    answers = await mesh.calls(100)
    assert Counter((a.code, a.worker) for a in answers) == {(OK, mesh.workers[0].address): 100}
    assert await mesh.stat(FAILED_OPEN) == 0


async def test_a_stopped_batcher_delays_the_end_of_a_stream_by_a_second_at_most(mesh: Mesh):
    await mesh.start()
    streams = [asyncio.create_task(mesh.call(hold_at=1)) for _ in range(20)]
    await mesh.workers[0].saw("holding", 20)
    await mesh.batchers[0].saw("response_headers", 20)
    mesh.batchers[0].freeze()
    began = asyncio.get_running_loop().time()
    mesh.workers[0].tell(release=True)
    answers = await asyncio.gather(*streams)
    assert asyncio.get_running_loop().time() - began < 2.5
    assert Counter(a.code for a in answers) == {OK: 20}


async def test_a_stopped_batcher_costs_a_new_request_a_second_at_most(mesh: Mesh):
    await mesh.start()
    await mesh.call()
    mesh.batchers[0].freeze()
    answer = await mesh.call()
    assert answer.code is OK
    assert answer.took_s < 2.5


async def test_a_full_worker_is_passed_over_and_the_batcher_not_asked_again(mesh: Mesh):
    await mesh.start()
    full, other = mesh.workers
    answers = await mesh.calls(50, full=[full.address])
    assert Counter((a.code, a.worker) for a in answers) == {(OK, other.address): 50}
    assert len(mesh.batchers[0].of("request_headers")) == 50
    # Although the pick came twice, in the header and in dynamic metadata, it is one try.
    assert len(full_ones := mesh.workers[0].of("call")) == 50, len(full_ones)


async def test_full_everywhere_reaches_the_caller_as_resource_exhausted(mesh: Mesh):
    await mesh.start()
    answer = await mesh.call(full=[w.address for w in mesh.workers])
    assert (answer.code, answer.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WORKER_FULL")


async def test_a_refusal_reaches_the_caller_and_no_worker(mesh: Mesh):
    await mesh.start(refuse=True)
    answer = await mesh.call()
    assert (answer.code, answer.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
    refused = answer.initial | answer.trailing
    assert refused["x-llm-d-request-dropped-reason"] == "rejected-saturated"
    assert not any(w.of("call") for w in mesh.workers)


async def test_health_binds_the_fallback_but_not_the_batchers_pick(mesh: Mesh):
    await mesh.start()
    sick, well = mesh.workers
    sick.tell(healthy=False)
    await mesh.until("cluster.worker.membership_healthy", lambda count: count == 1)
    assert {a.worker for a in await mesh.calls(20)} == {sick.address}
    await mesh.batchers[0].kill()
    assert {a.worker for a in await mesh.calls(20)} == {well.address}


async def test_only_generate_is_carried_and_the_rest_is_unimplemented(mesh: Mesh):
    await mesh.start()
    answer = await mesh.call(method="/loom.worker.v1.WorkerService/LoadModel")
    assert answer.code is grpc.StatusCode.UNIMPLEMENTED
    assert "Generate only" in answer.details
    assert not mesh.batchers[0].of("opened")


async def test_a_large_prompt_moves_to_another_worker_too(mesh: Mesh):
    await mesh.start()
    answer = await mesh.call(full=[mesh.workers[0].address], padding=3_000_000)
    assert (answer.code, answer.worker) == (OK, mesh.workers[1].address)
    (seen,) = mesh.workers[1].of("call")
    assert seen["bytes"] > 3_000_000


async def test_a_sender_cannot_pick_or_claim_a_lease_and_hashes_stay_behind(mesh: Mesh):
    await mesh.start()
    forged = [
        ("x-gateway-destination-endpoint", mesh.workers[1].address),
        ("x-loom-lease", "forged"),
        ("x-loom-prefix-bin", b"12345678"),
        ("x-loom-tenant", "t"),
    ]
    await mesh.call(forged)
    (asked,) = mesh.batchers[0].of("request_headers")
    assert "x-gateway-destination-endpoint" not in asked["headers"]
    assert asked["headers"]["x-loom-prefix-bin"] == "MTIzNDU2Nzg"
    (seen,) = mesh.workers[0].of("call")
    assert (seen["metadata"]["x-loom-lease"], seen["metadata"]["x-loom-tenant"]) == ("lease-1", "t")
    assert "x-loom-prefix-bin" not in seen["binary"]
    await mesh.batchers[0].kill()
    await mesh.call(forged)
    unled = [e["metadata"] for w in mesh.workers for e in w.of("call")][-1]
    assert "x-loom-lease" not in unled
