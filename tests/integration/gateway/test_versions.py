"""From a model string to one version: aliases that move, canaries, sessions, deprecation, no workers."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest
from loom.inference.v1 import inference_pb2 as pb

from tests.integration.gateway.conftest import SCRIPT, SENTENCE, TOKENIZER
from tests.integration.gateway.fakes import breaks_after, response
from tests.unit.gateway.made import CHAT_TEMPLATE, files_of
from tokenloom.kit.errors import CallError, from_rpc_error

MESSAGES = [{"role": "user", "content": "?"}]
CHAT_BODY = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
DEPRECATED = "x-loom-model-deprecated"
NO_TEMPLATE = (
    "model 'plain' has no chat template, so messages cannot be made into its prompt: "
    "use Generate with a prompt (gRPC) or /v1/completions (HTTP)"
)


@pytest.fixture
async def two(house):
    """`tiny` with an old and a new version, all traffic on the old one; (house, old, new)."""
    old = house.modelstore.models["tiny"].versions[0].digest
    files = files_of(TOKENIZER, {"chat_template": CHAT_TEMPLATE})
    new = house.modelstore.release("tiny", files, has_chat_template=True, weight_bytes=269_000_000)
    await house.catalogue_changed()
    return house, old, new


async def point(house, weights, alias="stable"):
    house.modelstore.point("tiny", alias, weights)
    await house.catalogue_changed()


def prompt(model="tiny", tokens=1, **fields):
    request = pb.GenerateRequest(model=model, prompt="Paris", **fields)
    request.stop.max_new_tokens = tokens
    return request


async def generate(house, request=None):
    """The version that served, and the answer's text."""
    messages = [m async for m in house.stub.Generate(request or prompt())]
    version = messages[0].started.model_version.removeprefix("tiny@")
    assert house.worker.metadata[-1]["x-loom-model"] == version
    return version, "".join(m.delta.text for m in messages)


async def chat(house, headers=None, **body):
    async with house.http.post("/v1/chat/completions", json=CHAT_BODY | body, headers=headers) as answer:
        return answer.status, await answer.json(), answer.headers


async def test_an_alias_that_moves_is_followed_by_the_next_request(two):
    house, old, new = two
    assert (await generate(house))[0] == old
    await point(house, {new: 1})
    assert (await generate(house))[0] == new
    assert (await generate(house, prompt(f"tiny@{old}")))[0] == old


async def test_a_request_that_breaks_goes_on_with_its_version_though_the_alias_moved_and_it_is_gone(two):
    house, old, new = two

    async def deleted_meanwhile(worker, request, call):
        for position in range(4):
            yield response(worker, request, position, False)
        house.modelstore.models["tiny"].versions.remove(house.modelstore.version("tiny", old))
        await point(house, {new: 1})
        raise CallError("ENGINE_RESTARTED", "gone")

    house.worker.attempts = [deleted_meanwhile]
    messages = [m async for m in house.stub.Generate(prompt(tokens=len(SCRIPT)))]
    assert "".join(m.delta.text for m in messages) == SENTENCE
    assert [m["x-loom-model"] for m in house.worker.metadata] == [old, old]
    assert [r.model_version for r in house.worker.requests] == [old, old]
    assert (await generate(house))[0] == new
    with pytest.raises(grpc.aio.AioRpcError, match="there is no"):
        await generate(house, prompt(f"tiny@{old}"))


async def test_a_canary_gets_its_share_of_requests_over_both_doors(two):
    house, old, new = two
    await point(house, {old: 90, new: 10})
    for number in range(200):
        await (generate(house) if number % 2 else chat(house))
    got = Counter(m["x-loom-model"] for m in house.worker.metadata)
    assert got[old] + got[new] == 200
    assert abs(got[new] - 20) <= 1


async def test_refused_requests_and_questions_use_up_no_turn(two):
    house, old, new = two
    await point(house, {old: 1, new: 1})
    for _ in range(10):
        await generate(house)
        status, _, _ = await chat(house, temperature=9)
        assert status == 400
        await house.stub.GetModel(pb.GetModelRequest(model="tiny"))
        await house.stub.CountTokens(pb.CountTokensRequest(model="tiny", prompt="x"))
    got = [m["x-loom-model"] for m in house.worker.metadata]
    assert got in ([old, new] * 5, [new, old] * 5)


async def test_a_session_keeps_its_version_whichever_way_it_is_named(two):
    house, old, new = two
    await point(house, {old: 1, new: 1})
    chosen = {}
    for key in map(str, range(8)):
        chosen[key] = (await generate(house, prompt(session_key=key)))[0]
        await generate(house, prompt(session_key=key))
        await chat(house, user=key)
        await chat(house, safety_identifier=key)
        await chat(house, headers={"x-session-id": key}, user="somebody else")
        got = {m["x-loom-model"] for m in house.worker.metadata[-5:]}
        assert got == {chosen[key]}
    assert set(chosen.values()) == {old, new}


async def test_a_session_that_cannot_be_named_so_is_refused_by_the_name_of_its_header(house):
    status, answer, _ = await chat(house, headers={"x-session-id": "x" * 129})
    assert (status, answer["error"]["param"]) == (400, "x-session-id")
    with pytest.raises(grpc.aio.AioRpcError, match="session_key: must have at most 128 characters"):
        await generate(house, prompt(session_key="x" * 129))


async def test_the_batcher_learns_how_large_the_weights_are(two):
    house, _, new = two
    await generate(house, prompt(f"tiny@{new}"))
    assert house.worker.metadata[-1]["x-loom-model-bytes"] == "269000000"
    await generate(house)
    assert "x-loom-model-bytes" not in house.worker.metadata[-1]


async def test_a_deprecated_version_serves_and_says_so(two):
    house, old, new = two
    why = "50% slower than tiny-2:\nuse that, s'il vous plaît"
    house.modelstore.version("tiny", old).deprecation.message = why
    told = "50%25 slower than tiny-2: use that, s'il vous pla%C3%AEt"
    await house.catalogue_changed()
    call = house.stub.Generate(prompt())
    assert [m async for m in call][-1].HasField("finished")
    assert dict(await call.initial_metadata())[DEPRECATED] == told
    whole = await chat(house)
    streamed = await house.http.post("/v1/chat/completions", json=CHAT_BODY | {"stream": True})
    assert (whole[0], whole[2][DEPRECATED]) == (200, told)
    assert (streamed.status, streamed.headers[DEPRECATED]) == (200, told)
    assert (await streamed.read()).endswith(b"data: [DONE]\n\n")
    call = house.stub.Generate(prompt(f"tiny@{new}"))
    assert [m async for m in call]
    assert DEPRECATED not in dict(await call.initial_metadata())


async def test_a_deprecated_version_is_shown_where_models_are(two):
    house, old, _ = two
    deprecation = house.modelstore.version("tiny", old).deprecation
    deprecation.message = "use tiny-2"
    deprecation.since.FromSeconds(1_700_000_000)
    await house.catalogue_changed()
    shown = {"message": "use tiny-2", "since": 1_700_000_000}
    models = [model async for model in house.client.models.list()]
    assert [(m.id, m.deprecated) for m in models] == [("plain", None), ("tiny", shown)]
    async with house.http.get("/v1/models/tiny") as answer:
        assert ((await answer.json())["deprecated"], answer.headers[DEPRECATED]) == (shown, "use tiny-2")
    call = house.stub.GetModel(pb.GetModelRequest(model="tiny"))
    assert (await call).model.version == f"tiny@{old}"
    assert dict(await call.initial_metadata())[DEPRECATED] == "use tiny-2"


async def test_every_model_that_an_alias_names_is_listed_whoever_holds_it(two):
    house, old, new = two
    await house.worker.stop()
    house.modelstore.release("plain", {"tokenizer.json": b"{}"})
    await point(house, {new: 1}, alias="canary")
    models = [model async for model in house.client.models.list()]
    assert [m.id for m in models] == ["plain", "tiny", "tiny@canary"]
    assert [m.root for m in models[1:]] == [f"tiny@{old}", f"tiny@{new}"]


@pytest.mark.parametrize("reason", ["MODEL_NOT_READY", "NO_CAPACITY", "MODEL_MEMORY_BUSY"])
async def test_why_no_worker_could_be_had_reaches_the_caller_with_its_hint(house, reason):
    refusal = CallError(reason, "all 3 GB are taken; try again", metadata={"model": "m"}, retry_after_s=7.2)
    house.worker.answer = breaks_after(0, refusal)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(house)
    got = from_rpc_error(failure.value)
    assert (got.reason, got.message, got.metadata) == (reason, refusal.message, {"model": "m"})
    assert got.retry_after_s == 7.2
    status, answer, headers = await chat(house)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, reason.lower(), "8")
    assert answer["error"]["message"] == refusal.message
    assert len(house.worker.requests) == 2


async def test_a_chat_with_a_model_without_a_template_is_refused_in_words_and_plain_prompts_work(house):
    request = pb.GenerateRequest(model="plain")
    request.chat.messages.add(role="user", content="?")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(house, request)
    got = from_rpc_error(failure.value)
    assert (got.reason, got.metadata) == ("CHAT_TEMPLATE_MISSING", {"model": "plain"})
    assert got.message == failure.value.details() == NO_TEMPLATE
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    status, answer, _ = await chat(house, model="plain")
    assert status == 400
    assert answer["error"] == {
        "message": NO_TEMPLATE,
        "type": "invalid_request_error",
        "param": None,
        "code": "chat_template_missing",
    }
    body = {"model": "plain", "prompt": "Paris", "max_tokens": len(SCRIPT)}
    async with house.http.post("/v1/completions", json=body) as completed:
        assert (await completed.json())["choices"][0]["text"] == SENTENCE
    assert [m async for m in house.stub.Generate(prompt("plain"))][-1].HasField("finished")
