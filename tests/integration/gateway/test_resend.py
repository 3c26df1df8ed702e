"""Calls that break: sent again before the first token, resumed after it, and never doubled."""

from __future__ import annotations

import json

import grpc
import pytest
from loom.inference.v1 import inference_pb2 as pb

from tests.integration.gateway.conftest import SCRIPT, SENTENCE
from tests.integration.gateway.fakes import breaks_after, hangs, resets_after, response
from tokenloom.kit.errors import CallError, from_rpc_error

CHAT_BODY = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": len(SCRIPT)}


def full():
    return CallError("WORKER_FULL", "no room", metadata={"worker": "w"})


def gone():
    return CallError("SERVICE_UNAVAILABLE", "the worker went away", metadata={"service": "worker"})


def restarted():
    return CallError("ENGINE_RESTARTED", "the engine restarted")


def refused(reason="QUEUE_FULL", retry_after_s=None):
    return CallError(reason, "no", retry_after_s=retry_after_s)


async def text_of(house, **fields):
    request = pb.GenerateRequest(model="tiny", prompt="x", **fields)
    request.stop.max_new_tokens = len(SCRIPT)
    request.output.token_ids = True
    ids, text = [], ""
    async for message in house.stub.Generate(request):
        text += message.delta.text
        ids += message.delta.token_ids
    return text, ids


async def chat(house, **body):
    async with house.http.post("/v1/chat/completions", json=CHAT_BODY | body) as answer:
        return answer.status, await answer.read(), answer.headers


@pytest.mark.parametrize("error", [full, gone, restarted])
async def test_a_call_that_fails_before_its_first_token_is_sent_again(house, error):
    house.worker.attempts = [breaks_after(0, error()), breaks_after(0, error())]
    assert await text_of(house) == (SENTENCE, SCRIPT)
    assert len(house.worker.requests) == 3


async def test_each_attempt_keeps_its_id_and_arrival_and_counts_up(house):
    house.worker.attempts = [breaks_after(0, full()), breaks_after(2, gone())]
    await text_of(house)
    sent = house.worker.metadata
    assert [m["x-loom-attempt"] for m in sent] == ["1", "2", "3"]
    assert len({m["x-loom-request-id"] for m in sent}) == 1
    assert len({m["x-loom-arrival-unix-ms"] for m in sent}) == 1
    assert len({m["x-loom-deadline-unix-ms"] for m in sent}) == 1


@pytest.mark.parametrize("tokens", [1, 3, 12, len(SCRIPT) - 1])
@pytest.mark.parametrize("error", [gone, restarted])
async def test_a_stream_that_breaks_goes_on_with_the_identical_text(house, tokens, error):
    house.worker.attempts = [breaks_after(tokens, error())]
    assert await text_of(house) == (SENTENCE, SCRIPT)
    assert list(house.worker.requests[1].output_token_ids) == SCRIPT[:tokens]
    assert house.worker.requests[1].max_new_tokens == len(SCRIPT)


async def test_a_stream_may_break_again_and_again_as_long_as_it_moves_on(house):
    house.worker.attempts = [breaks_after(1, gone()) for _ in range(12)]
    assert await text_of(house) == (SENTENCE, SCRIPT)


async def test_a_reset_stream_is_resumed(house):
    house.worker.attempts = [resets_after(0), resets_after(3)]
    assert await text_of(house) == (SENTENCE, SCRIPT)


async def test_a_worker_that_dies_in_the_middle_is_survived_over_http(house):
    house.worker.attempts = [breaks_after(5, gone())]
    status, raw, _ = await chat(house, stream=True)
    chunks = [json.loads(b[6:]) for b in raw.split(b"\n\n") if b and b != b"data: [DONE]"]
    assert status == 200
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == SENTENCE


async def test_tokens_that_come_twice_are_shown_once(house):
    async def repeats(worker, request, call):
        for position in (0, 1, 2, 1, 2, 3):
            yield response(worker, request, position, False)
        raise gone()

    house.worker.attempts = [repeats]
    assert await text_of(house) == (SENTENCE, SCRIPT)


async def test_tokens_that_are_missing_are_asked_for_again(house):
    async def skips(worker, request, call):
        for position in (0, 1, 4, 5):
            yield response(worker, request, position, False)

    house.worker.attempts = [skips]
    assert await text_of(house) == (SENTENCE, SCRIPT)
    assert list(house.worker.requests[1].output_token_ids) == SCRIPT[:2]


async def test_a_stream_that_ends_without_a_last_word_is_resumed(house):
    async def stops_short(worker, request, call):
        yield response(worker, request, 0, False)

    house.worker.attempts = [stops_short]
    assert await text_of(house) == (SENTENCE, SCRIPT)


async def test_a_stream_that_breaks_after_its_last_token_is_not_sent_again(house):
    house.worker.attempts = [breaks_after(len(SCRIPT), gone())]
    assert await text_of(house) == (SENTENCE, SCRIPT)
    assert len(house.worker.requests) == 1


async def test_a_request_that_kills_every_engine_is_given_up(house):
    house.worker.answer = breaks_after(0, restarted())
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await text_of(house)
    assert from_rpc_error(failure.value).reason == "ENGINE_RESTARTED"
    assert len(house.worker.requests) == 6


async def test_a_refusal_by_policy_goes_to_the_caller_with_its_hint(house):
    house.worker.attempts = [breaks_after(0, refused(retry_after_s=2.5))]
    status, raw, headers = await chat(house)
    assert (status, headers["retry-after"]) == (429, "3")
    assert json.loads(raw)["error"]["type"] == "rate_limit_error"
    assert len(house.worker.requests) == 1


async def test_after_a_break_even_a_policys_refusal_is_waited_out(house):
    house.worker.attempts = [breaks_after(3, gone()), breaks_after(0, refused()), breaks_after(0, full())]
    assert await text_of(house) == (SENTENCE, SCRIPT)


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(house):
    invalid = CallError("FIELD_INVALID", "unexpected")
    house.worker.attempts = [breaks_after(2, invalid)]
    status, raw, _ = await chat(house, stream=True)
    assert status == 200
    blocks = raw.strip().split(b"\n\n")
    assert blocks[-1] == b"data: [DONE]"
    assert json.loads(blocks[-2][6:])["error"]["code"] == "field_invalid"


async def test_with_the_mesh_away_the_caller_learns_it_at_its_deadline(house):
    await house.worker.stop()
    request = pb.GenerateRequest(model="tiny", prompt="x")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async for _ in house.stub.Generate(request, timeout=0.6):
            pass
    assert failure.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_the_deadline_travels_and_ends_a_call_that_hangs(house):
    house.worker.attempts = [hangs]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async for _ in house.stub.Generate(pb.GenerateRequest(model="tiny", prompt="x"), timeout=1.0):
            pass
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    sent = house.worker.metadata[0]
    assert int(sent["x-loom-deadline-unix-ms"]) - int(sent["x-loom-arrival-unix-ms"]) <= 1100
    await house.worker.left_alone()


async def test_a_queue_timeout_ends_the_wait_for_the_first_token(house):
    house.worker.attempts = [hangs]
    request = pb.GenerateRequest(model="tiny", prompt="x")
    request.queue_timeout.FromMilliseconds(500)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async for _ in house.stub.Generate(request):
            pass
    assert from_rpc_error(failure.value).reason == "QUEUE_TIMEOUT"
    await house.worker.left_alone()
