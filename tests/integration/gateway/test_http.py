"""The OpenAI-compatible door, through the official client and by hand."""

from __future__ import annotations

import asyncio
import io
import json

import openai
import pytest

from tests.integration.gateway.conftest import SCRIPT, SENTENCE, TOKENIZER
from tests.integration.gateway.fakes import hangs, hangs_after

END = TOKENIZER.token_to_id("<|end|>")
CHAT = [{"role": "user", "content": "Where is Paris?"}]
CHAT_BODY = {"model": "tiny", "messages": CHAT, "max_tokens": len(SCRIPT)}


async def post(house, path="/v1/chat/completions", *, headers=None, **body):
    async with house.http.post(path, json=CHAT_BODY | body, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def error(house, path="/v1/chat/completions", **body):
    status, answer, _ = await post(house, path, **body)
    return status, answer["error"]


def events_of(raw):
    """The JSON of each server-sent event; the last must be [DONE]."""
    blocks = raw.decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def test_the_official_client_gets_a_chat_answer(house):
    answer = await house.client.chat.completions.create(**CHAT_BODY)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == len(SCRIPT)
    assert answer.usage.prompt_tokens == len(house.worker.requests[0].prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.model == "tiny"


async def test_the_official_client_streams_a_chat_answer_with_usage(house):
    stream = await house.client.chat.completions.create(
        **CHAT_BODY, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SENTENCE
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len(SCRIPT))
    assert len(chunks) - 1 >= 0.9 * sum(c.isascii() for c in SENTENCE) / 4


async def test_the_official_client_completes_text(house):
    answer = await house.client.completions.create(model="tiny", prompt="Paris", max_tokens=len(SCRIPT))
    assert answer.choices[0].text == SENTENCE
    stream = await house.client.completions.create(
        model="tiny", prompt=SCRIPT[:3], max_tokens=len(SCRIPT), stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == SENTENCE
    assert list(house.worker.requests[1].prompt_token_ids) == SCRIPT[:3]


async def test_the_official_client_lists_models(house):
    models = [model async for model in house.client.models.list()]
    assert [(m.id, m.max_model_len) for m in models] == [("plain", 512), ("tiny", 512)]
    assert (await house.client.models.retrieve("tiny")).root.startswith("tiny@sha256:")
    with pytest.raises(openai.NotFoundError, match="known models: plain, tiny"):
        await house.client.models.retrieve("tinny")


async def test_an_unknown_model_is_answered_with_the_known_ones(house):
    with pytest.raises(openai.NotFoundError, match="known models: plain, tiny") as failure:
        await house.client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert (failure.value.code, failure.value.param) == ("model_not_found", "model")


async def test_stop_strings_end_the_answer(house):
    house.worker.attempts = [hangs_after(len(SCRIPT) - 1)]
    answer = await house.client.chat.completions.create(**CHAT_BODY, stop=[" of", "x"])
    assert answer.choices[0].message.content == "Paris is the capital"
    assert answer.choices[0].finish_reason == "stop"
    await asyncio.wait_for(house.worker.freed.wait(), 5)


async def test_several_choices_come_from_several_seeds(house):
    answer = await house.client.chat.completions.create(**CHAT_BODY, n=3, seed=5)
    assert [choice.message.content for choice in answer.choices] == [SENTENCE] * 3
    assert sorted(request.sampling.seed for request in house.worker.requests) == [5, 6, 7]
    ids = {request.request_id for request in house.worker.requests}
    assert len(ids) == 3
    assert answer.usage.completion_tokens == 3 * len(SCRIPT)


async def test_several_choices_stream_side_by_side(house):
    stream = await house.client.chat.completions.create(**CHAT_BODY, n=2, stream=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == {0: SENTENCE, 1: SENTENCE}


async def test_logprobs_come_with_each_token(house):
    answer = await house.client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    text = await house.client.completions.create(model="tiny", prompt="x", max_tokens=2, logprobs=1)
    assert text.choices[0].logprobs.token_logprobs == [-0.25, -0.25]


async def test_sampling_and_stops_reach_the_worker(house):
    await house.client.chat.completions.create(
        **CHAT_BODY, temperature=0, top_p=0.5, seed=9,
        extra_body={"top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True,
                    "stop_token_ids": [7]},
    )  # fmt: skip
    request = house.worker.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 3, 9)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (request.min_new_tokens, list(request.stop_token_ids)) == (2, [7])


async def test_the_model_s_own_end_is_a_stop(house):
    house.worker.script = [*SCRIPT[:3], END]
    answer = await house.client.chat.completions.create(model="tiny", messages=CHAT)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == TOKENIZER.decode(SCRIPT[:3])
    assert house.worker.requests[0].max_new_tokens == 512 - answer.usage.prompt_tokens


async def test_the_request_id_is_echoed_and_reaches_the_worker(house):
    _, answer, headers = await post(house, headers={"x-request-id": "my-id"})
    assert (headers["x-request-id"], answer["id"]) == ("my-id", "chatcmpl-my-id")
    assert house.worker.metadata[0]["x-loom-request-id"] == "my-id"
    _, _, headers = await post(house)
    assert len(headers["x-request-id"]) == 32


async def test_two_open_requests_of_one_id_are_two_requests_to_the_mesh(house):
    house.worker.attempts = [hangs]
    first = asyncio.create_task(post(house, headers={"x-request-id": "same"}))
    await asyncio.wait_for(house.worker.begun.wait(), 5)
    _, _, headers = await post(house, headers={"x-request-id": "same"})
    ids = [request.request_id for request in house.worker.requests]
    assert headers["x-request-id"] == "same"
    assert ids[0] == "same"
    assert ids[1].startswith("same~")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_priority_and_the_wished_time_to_the_first_token_reach_the_batcher(house):
    await post(house, headers={"x-slo-ttft-ms": "400"}, priority="interactive")
    await post(house)
    first, second = house.worker.metadata
    assert (first["x-loom-priority"], first["x-loom-ttft-slo-ms"]) == ("1", "400")
    assert second["x-loom-priority"] == "2"
    assert "x-loom-ttft-slo-ms" not in second


async def test_a_wish_that_is_no_time_is_a_400_that_names_the_header(house):
    status, answer, _ = await post(house, headers={"x-llm-d-slo-ttft-ms": "soon"})
    got = answer["error"]
    assert (status, got["code"], got["param"]) == (400, "field_invalid", "x-llm-d-slo-ttft-ms")
    assert "milliseconds from 1 to 3600000" in got["message"]
    assert house.worker.requests == []


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"temperature": -1}, 400, "field_invalid", "temperature", "must be from 0 to 2"),
        ({"max_tokens": 0}, 400, "field_invalid", "max_tokens", "must be from 1"),
        ({"messages": []}, 400, "field_invalid", "messages", "must hold 1 to 4096 messages"),
        ({"stop": [""]}, 400, "field_invalid", "stop[0]", "must have 1 to 256 characters"),
        ({"frobnicate": 1}, 400, "field_invalid", "frobnicate", "is not a field"),
        ({"tools": [{}]}, 400, "feature_unsupported", "tools", "tools: is not supported"),
        ({"max_tokens": 1000}, 400, "context_length_exceeded", None, "context of 512 tokens"),
        ({"model": "plain"}, 400, "chat_template_missing", None, "use Generate with a prompt"),
        ({"model": "a b"}, 400, "field_invalid", "model", "is no name"),
        ({"model": None}, 400, "field_invalid", "model", "is required"),
    ],
)
async def test_a_bad_request_is_answered_with_its_field(house, body, status, code, param, says):
    got_status, got = await error(house, **body)
    assert (got_status, got["code"], got["param"]) == (status, code, param)
    assert says in got["message"]
    assert got["type"] == "invalid_request_error"
    assert house.worker.requests == []


async def test_all_problems_of_a_body_are_reported_at_once(house):
    _, got = await error(house, temperature=9, top_p="x", n=0, messages=[{"role": "robot", "content": "x"}])
    for field in ("temperature", "top_p", "n:", "messages[0].role"):
        assert field in got["message"]


async def raw(house, data, path="/v1/chat/completions"):
    async with house.http.post(path, data=io.BytesIO(data)) as response:
        return response.status, (await response.json())["error"]


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b'{"model": "\xff"}', b"[]", b"", b'{"x": NaN}'])
async def test_a_body_that_is_no_json_object_is_a_400(house, data):
    status, got = await raw(house, data)
    assert (status, got["code"]) == (400, "request_malformed")


async def test_a_prompt_above_its_bound_is_a_413(house):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * (5 << 20)}]}
    status, got = await raw(house, json.dumps(body).encode())
    assert (status, got["code"]) == (413, "request_too_large")
    assert "messages" in got["message"]


async def test_a_body_above_its_bound_is_a_413_before_it_was_read(house):
    status, got = await raw(house, b" " * ((16 << 20) + 1))
    assert (status, got["code"]) == (413, "request_too_large")


async def test_wrong_paths_and_methods_are_answered_in_openais_shape(house):
    async with house.http.get("/v1/nothing") as response:
        assert (response.status, "error" in await response.json()) == (404, True)
    async with house.http.get("/v1/completions") as response:
        assert (response.status, "error" in await response.json()) == (405, True)


async def test_health_and_version_answer(house):
    async with house.http.get("/health") as response:
        assert response.status == 200
    async with house.http.get("/version") as response:
        assert (await response.json())["version"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("attempt", [hangs, hangs_after(2)])
async def test_a_client_that_disconnects_frees_the_call_at_once(house, stream, attempt):
    house.worker.attempts = [attempt]
    call = asyncio.create_task(post(house, stream=stream))
    await asyncio.wait_for(house.worker.begun.wait(), 5)
    call.cancel()
    await asyncio.wait_for(house.worker.freed.wait(), 5)
    await asyncio.gather(call, return_exceptions=True)
    assert house.worker.open == 0


async def test_a_gateway_that_is_full_says_when_to_come_back(house):
    house.gateway.pipeline._limits = type(house.gateway.pipeline._limits)(1, 1 << 20)
    house.worker.attempts = [hangs]
    call = asyncio.create_task(post(house))
    await asyncio.wait_for(house.worker.begun.wait(), 5)
    status, answer, headers = await post(house)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_a_streamed_answer_is_one_chunk_for_each_message_and_ends_with_done(house):
    async with house.http.post("/v1/chat/completions", json=CHAT_BODY | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events_of(await response.read())
    emoji_tokens = len(TOKENIZER.encode("🎉").ids) + 2
    assert len(SCRIPT) - emoji_tokens <= len(chunks) <= len(SCRIPT)
