"""The load client against a server that misbehaves in every way that servers do."""

import asyncio

import pytest
from aiohttp import web

from tokenloom.bench.prompts import Item, Part
from tokenloom.bench.stats import Record
from tokenloom.cli.bench_http import HttpTarget
from tokenloom.cli.bench_load import RequestFailed

PEERS: list[object] = []
"""Of every request, in their order."""
PIECE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
TIMEOUT_S = 0.5


async def answer(request: web.Request) -> web.StreamResponse:
    """The model's name says what goes wrong."""
    body = await request.json()
    how = body["model"]
    assert request.transport is not None
    PEERS.append(request.transport.get_extra_info("peername"))
    if how == "busy":
        error = {"error": {"message": "full", "type": "rate_limit", "code": "QUEUE_FULL"}}
        return web.json_response(error, status=429)
    if how == "html":
        return web.Response(status=502, text="<html>")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    if how == "last":
        response.force_close()
    await response.prepare(request)
    await response.write(PIECE)
    if how == "slow":
        await asyncio.sleep(10 * TIMEOUT_S)
    if how == "reset":
        request.transport.abort()
    elif how == "garbage":
        await response.write(b"data: {\n\n")
    elif how == "failing":
        await response.write(b'data: {"error":{"message":"x","code":"ENGINE_RESTARTED"}}\n\n' + DONE)
    elif how in ("good", "last"):
        await response.write(PIECE + DONE)
    await response.write_eof()
    return response


@pytest.fixture
async def target():
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    made = HttpTarget(f"http://127.0.0.1:{port}", "chat", TIMEOUT_S)
    yield made
    await made.close()
    await runner.cleanup()


async def asked(target, model):
    target.model = model
    record = Record()
    await target.ask(target.prepare(Item((Part("a", 3),), 2), 0), record)
    return record


@pytest.mark.parametrize(
    ("model", "error", "pieces"),
    [
        ("good", "", 2),
        ("last", "", 2),
        ("busy", "QUEUE_FULL", 0),
        ("html", "HTTP_502", 0),
        ("cut", "CUT_OFF", 1),
        ("reset", "DISCONNECTED", 1),
        ("garbage", "NOT_UNDERSTOOD", 1),
        ("failing", "ENGINE_RESTARTED", 1),
        ("slow", "TIMEOUT", 1),
    ],
)
async def test_every_way_to_fail_has_a_reason(target, model, error, pieces):
    record = await asked(target, model)
    assert (record.error, len(record.pieces_s)) == (error, pieces)


async def test_a_connection_is_kept_for_the_next_request_unless_it_was_its_last(target):
    PEERS.clear()
    for model in ("good", "busy", "good", "reset", "last", "good"):
        assert (await asked(target, model)).error in ("", "QUEUE_FULL", "DISCONNECTED")
    assert len(set(PEERS[:4])) == 1
    assert len(set(PEERS[3:])) == 3


async def test_requests_at_the_same_time_have_connections_of_their_own(target):
    PEERS.clear()
    records = await asyncio.gather(*(asked(target, "good") for _ in range(5)))
    assert [len(record.pieces_s) for record in records] == [2] * 5
    assert len(set(PEERS)) == 5


async def test_a_server_that_is_not_there_is_a_failed_connection():
    target = HttpTarget("http://127.0.0.1:1", "chat", 1.0)
    try:
        assert (await asked(target, "x")).error == "CONNECT"
        with pytest.raises(RequestFailed, match="CONNECT"):
            await target.models()
    finally:
        await target.close()


async def test_a_server_without_a_list_of_models_is_refused_with_its_words(target):
    with pytest.raises(RequestFailed, match="HTTP_404: 404: Not Found"):
        await target.models()
