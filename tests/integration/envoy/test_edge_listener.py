"""What the public port does with each protocol, and what it lets through."""

import asyncio
import base64
import json
import random
from contextlib import AsyncExitStack

import aiohttp
import grpc
import pytest

from tests.integration.envoy.edge_fakes import Gateway, h2c_post
from tests.integration.envoy.harness import Mesh
from tokenloom.cli.ports import free_ports

METHOD = "/loom.inference.v1.InferenceService/ListModels"


@pytest.fixture
async def gateway():
    async with AsyncExitStack() as stack:
        yield await Gateway().start(stack)


@pytest.fixture
async def edge(mesh: Mesh, gateway: Gateway):
    """Envoy with one gateway and nothing behind the mesh listener."""
    await mesh.start(workers=0, batchers=0, endpoints=places(gateway))
    mesh.channel = mesh.open(mesh.ports.edge)
    return mesh


@pytest.fixture
async def http(edge: Mesh):
    async with aiohttp.ClientSession(f"http://127.0.0.1:{edge.ports.edge}") as session:
        yield session


def places(gateway: Gateway, dead: int | None = None) -> dict[str, list[tuple[str, int]]]:
    """Where the gateway is; with `dead`, beside one that nobody answers for."""
    also = [] if dead is None else [("127.0.0.1", dead)]
    return {
        "gateway_grpc": [*also, ("127.0.0.1", gateway.grpc_port)],
        "gateway_http": [*also, ("127.0.0.1", gateway.http_port)],
    }


async def unary(mesh: Mesh, metadata=()) -> tuple[bytes, dict[str, str]]:
    call = mesh.channel.unary_unary(METHOD)(b"1234", metadata=metadata)
    return await call, dict(await call.initial_metadata())


async def test_grpc_json_h2c_and_grpc_web_share_the_port(edge: Mesh, http, gateway: Gateway):
    assert json.loads((await unary(edge))[0]) == {"method": METHOD, "bytes": 4}

    async with http.post("/v1/models?x=1", data=b"{}") as answer:
        assert await answer.json() == {"path": "/v1/models", "body": "{}"}

    framed = await h2c_post(edge.ports.edge, "/v1/models", b"{}", {"content-type": "application/json"})
    assert json.loads(framed) == {"path": "/v1/models", "body": "{}"}

    web_frame = b"\x00\x00\x00\x00\x04abcd"
    headers = {"content-type": "application/grpc-web+proto"}
    async with http.post(METHOD, data=web_frame, headers=headers) as answer:
        body = await answer.read()
    assert json.loads(body[5 : 5 + int.from_bytes(body[1:5], "big")])["bytes"] == 4
    assert b"grpc-status:0" in body[body.index(b"}") :]

    headers = dict.fromkeys(("content-type", "accept"), "application/grpc-web-text+proto")
    async with http.post(METHOD, data=base64.b64encode(web_frame), headers=headers) as answer:
        assert b'"bytes": 4' in base64.b64decode(await answer.read())


async def test_sse_arrives_as_it_is_written(http, gateway: Gateway):
    async with http.get("/v1/stream") as answer:
        assert await answer.content.readuntil(b"\n\n") == b"data: first\n\n"
        gateway.release.set()
        assert await answer.content.read() == b"data: [DONE]\n\n"


async def test_an_http_caller_that_leaves_is_noticed_by_the_gateway(http, gateway: Gateway):
    async with http.get("/v1/stream") as answer:
        await answer.content.readuntil(b"\n\n")
        answer.close()
    async with asyncio.timeout(10):
        await gateway.left.wait()


FORGED = {
    "x-loom-tenant": "admin",
    "x-loom-lease": "l",
    "x-gateway-destination-endpoint": "127.0.0.1:1",
    "x-gateway-destination-endpoint-subset": "127.0.0.1:1",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-retry-on": "5xx",
}
KEPT = {
    "x-llm-d-inference-fairness-id": "team",
    "x-request-id": "not-a-uuid",
    "authorization": "Bearer t",
}


async def test_headers_of_the_mesh_are_removed_and_others_kept(edge: Mesh, http, gateway: Gateway):
    async with http.get("/v1/models", headers=FORGED | KEPT) as answer:
        assert answer.status == 200
    await unary(edge, tuple((FORGED | KEPT).items()))
    assert len(gateway.seen) == 2
    for seen in gateway.seen:
        assert not seen.keys() & FORGED.keys()
        assert not [name for name in seen if name.startswith("x-envoy-")]
        assert KEPT.items() <= seen.items()


async def test_a_request_id_is_kept_or_made_and_always_returned(edge: Mesh, http, gateway: Gateway):
    async with http.get("/", headers={"x-request-id": "mine"}) as answer:
        assert answer.headers["x-request-id"] == "mine"
    async with http.get("/") as answer:
        assert answer.headers["x-request-id"] == gateway.seen[-1]["x-request-id"]
    _, returned = await unary(edge, (("x-request-id", "9b8a7c6d-1111-4222-8333-444455556666"),))
    # As it was: Envoy would otherwise write its sampling decision into a UUID.
    assert returned["x-request-id"] == "9b8a7c6d-1111-4222-8333-444455556666"


async def test_a_gateway_that_is_down_fails_no_call_while_another_lives(mesh: Mesh, gateway: Gateway):
    (dead,) = free_ports(1, random.Random())
    await mesh.start(workers=0, batchers=0, endpoints=places(gateway, dead))
    mesh.channel = mesh.open(mesh.ports.edge)
    answers = await asyncio.gather(*(unary(mesh) for _ in range(100)))
    assert len(answers) == 100
    async with aiohttp.ClientSession(f"http://127.0.0.1:{mesh.ports.edge}") as session:
        for _ in range(20):
            async with session.get("/") as answer:
                assert answer.status == 200


async def test_without_a_gateway_each_caller_gets_an_error_in_its_own_language(mesh: Mesh):
    await mesh.start(workers=0, batchers=0)
    mesh.channel = mesh.open(mesh.ports.edge)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await unary(mesh)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "{" not in refused.value.details()
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{mesh.ports.edge}") as session,
        session.get("/v1/models") as answer,
    ):
        assert answer.status == 503
        error = (await answer.json())["error"]
    assert (error["type"], error["code"]) == ("server_error", "SERVICE_UNAVAILABLE")
    assert error["message"]
    logged = [(line["path"], line["status"], line["grpc_status"]) for line in await mesh.logged()]
    assert logged == [(METHOD, 200, "Unavailable"), ("/v1/models", 503, None)]


async def test_the_log_has_what_failed_and_nothing_of_what_was_answered(edge: Mesh, http, gateway: Gateway):
    async def ask(path: str) -> int:
        async with http.post(path, data=b"{}", headers={"content-type": "application/json"}) as answer:
            return answer.status

    async def ask_grpc_web() -> str:
        """The gRPC status: in the headers when there is nothing else, else in the body's last frame."""
        headers = {"content-type": "application/grpc-web+proto"}
        async with http.post(METHOD, data=bytes(5), headers=headers) as answer:
            last = (await answer.read()).partition(b"grpc-status:")[2].decode()
            return answer.headers.get("grpc-status") or last[:1]

    assert await ask("/v1/fine") == 200
    async with http.get("/v1/stream") as streamed:
        gateway.release.set()
        await streamed.read()
    await unary(edge)
    assert await ask_grpc_web() == "0"
    gateway.status, gateway.code = 404, grpc.StatusCode.NOT_FOUND
    assert await ask("/v1/unknown") == 404
    with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
        await unary(edge)
    assert await ask_grpc_web() == "5"

    gateway.status, gateway.code = 500, grpc.StatusCode.UNAVAILABLE
    assert await ask("/v1/broken") == 500
    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        await unary(edge)
    assert await ask_grpc_web() == "14"
    # All of it is over before the log is read.
    lines = [(line["path"], line["status"], line["grpc_status"]) for line in await edge.logged()]
    assert lines == [
        ("/v1/broken", 500, None),
        (METHOD, 200, "Unavailable"),
        (METHOD, 200, "Unavailable"),
    ]


async def test_admin_answers_on_loopback_only_and_probes_show_what_others_may_see(edge: Mesh):
    assert await edge.get("/livez", edge.ports.probes) == "ok\n"
    assert "envoy_http_downstream_rq_total" in await edge.get("/metrics", edge.ports.probes)
    assert await edge.get("/quitquitquit", edge.ports.probes) == ""
    assert await edge.get("/config_dump", edge.ports.probes) == ""
