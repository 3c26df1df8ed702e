"""The typed door: `loom.inference.v1` with its streams, errors, models and traces."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loom.inference.v1 import inference_pb2 as pb

from tests.integration.gateway.conftest import SCRIPT, SENTENCE, TOKENIZER
from tests.integration.gateway.fakes import hangs_after
from tokenloom.contract.headers import RequestHeaders
from tokenloom.contract.prefix import block_hashes, root_hash, wire_hashes
from tokenloom.kit.errors import from_rpc_error

INVALID = "INVALID_ARGUMENT"
SERVICE = "loom.inference.v1.InferenceService"


def prompt(text="Paris", **fields):
    request = pb.GenerateRequest(model="tiny", prompt=text, **fields)
    request.stop.max_new_tokens = len(SCRIPT)
    return request


async def answer(house, request, **call):
    return [message async for message in house.stub.Generate(request, **call)]


async def refusal(house, request, **options):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await answer(house, request, **options)
    return failure.value.code(), from_rpc_error(failure.value)


def text_of(messages, choice=0):
    return "".join(m.delta.text for m in messages if m.HasField("delta") and m.delta.choice == choice)


async def test_a_prompt_is_answered_as_a_stream_of_text(house):
    messages = await answer(house, prompt())
    started, finished = messages[0].started, messages[-1].finished
    assert text_of(messages) == SENTENCE
    assert messages[0].HasField("delta")
    assert started.model_version == "tiny@" + house.worker.requests[0].model_version
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (len(TOKENIZER.encode("Paris").ids), 1)
    assert started.seed == house.worker.requests[0].sampling.seed
    assert started.request_id == house.worker.requests[0].request_id
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage.completion_tokens == len(SCRIPT)
    assert finished.timings.total.ToNanoseconds() >= finished.timings.time_to_first_token.ToNanoseconds() > 0
    assert len(messages) <= len(SCRIPT)


async def test_the_request_id_is_accepted_and_returned(house):
    call = house.stub.Generate(prompt(), metadata=[("x-request-id", "mine")])
    async for _ in call:
        pass
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_a_request_id_that_cannot_travel_is_refused(house):
    call = house.stub.Generate(prompt(), metadata=[("x-request-id", "x" * 129)])
    with pytest.raises(grpc.aio.AioRpcError, match="at most 128 printable ASCII"):
        await call.read()


async def test_chats_token_ids_and_choices_are_taken(house):
    chat = pb.GenerateRequest(model="tiny@stable")
    chat.chat.messages.add(role="user", content="Hi")
    chat.stop.max_new_tokens = len(SCRIPT)
    chat.output.choice_count = 2
    messages = await answer(house, chat)
    assert text_of(messages, 0) == text_of(messages, 1) == SENTENCE
    assert sum(m.HasField("started") for m in messages) == 1
    assert sorted(m.finished.choice for m in messages if m.HasField("finished")) == [0, 1]
    ids = pb.GenerateRequest(model="tiny", prompt_token_ids=pb.TokenIds(ids=[5, 6]))
    ids.stop.max_new_tokens = 1
    await answer(house, ids)
    assert list(house.worker.requests[-1].prompt_token_ids) == [5, 6]


async def test_token_ids_and_logprobs_come_along_when_asked_for(house):
    request = prompt()
    request.output.token_ids = request.output.logprobs = True
    request.output.top_logprobs = 2
    messages = await answer(house, request)
    assert [i for m in messages for i in m.delta.token_ids] == SCRIPT
    first = messages[0].delta.logprobs[0]
    assert (first.chosen.token_id, first.chosen.logprob) == (SCRIPT[0], -0.25)
    assert first.chosen.token.decode() == TOKENIZER.decode(SCRIPT[:1])
    assert len(first.top) == 2


async def test_a_stop_string_and_a_stop_token_are_named(house):
    request = prompt()
    request.stop.stop.append("capital")
    last = (await answer(house, request))[-1].finished
    assert (last.reason, last.matched_stop) == (pb.FINISH_REASON_STOP, "capital")
    request = prompt()
    request.stop.stop_token_ids.append(SCRIPT[2])
    messages = await answer(house, request)
    assert messages[-1].finished.matched_stop_token_id == SCRIPT[2]
    assert text_of(messages) == TOKENIZER.decode(SCRIPT[:2])


async def test_the_mesh_is_told_what_the_batcher_must_know(house):
    long = " ".join(["Paris is the capital"] * 150)
    request = prompt(long, priority=pb.PRIORITY_BATCH, cache_salt="salt")
    request.model = "tiny"
    house.modelstore.models["tiny"].versions[0].manifest.context_length = 4096
    await house.catalogue_changed()
    told = [("x-llm-d-inference-fairness-id", "team"), ("x-llm-d-slo-ttft-ms", "750")]
    await answer(house, request, metadata=told, timeout=30)
    headers = RequestHeaders.parse(house.worker.metadata[-1])
    sent = house.worker.requests[-1]
    ids = list(sent.prompt_token_ids)
    assert (headers.model, headers.tenant, headers.priority) == (sent.model_version, "team", 3)
    assert (headers.prompt_tokens, headers.max_new_tokens) == (len(ids), len(SCRIPT))
    # gRPC rounds timeouts up to three digits on the wire.
    assert 0 < headers.deadline_unix_ms - headers.arrival_unix_ms <= 31_000
    assert headers.prefix == wire_hashes(block_hashes(ids, root_hash(sent.model_version, "salt")))
    assert len(headers.prefix) >= 1
    assert (headers.ttft_slo_ms, headers.size_bytes) == (750, sent.ByteSize())
    assert (sent.tenant, sent.priority, sent.cache_salt) == ("team", 3, "salt")


async def test_a_wish_that_is_no_time_is_refused_by_the_name_of_its_header(house):
    code, error = await refusal(house, prompt(), metadata=[("x-slo-ttft-ms", "0")])
    assert (code.name, error.reason) == (INVALID, "FIELD_INVALID")
    assert [field for field, _ in error.violations] == ["x-slo-ttft-ms"]
    assert house.worker.requests == []


async def test_a_caller_that_leaves_frees_the_call_at_once(house):
    house.worker.attempts = [hangs_after(2)]
    call = house.stub.Generate(prompt())
    await call.read()
    call.cancel()
    await asyncio.wait_for(house.worker.freed.wait(), 5)


@pytest.mark.parametrize(
    ("change", "code", "reason", "says"),
    [
        (lambda r: setattr(r, "model", "nope"), "NOT_FOUND", "MODEL_NOT_FOUND", "known models: plain, tiny"),
        (
            lambda r: setattr(r, "model", "a b"),
            INVALID,
            "FIELD_INVALID",
            "model: 'a b' is no name",
        ),
        (
            lambda r: setattr(r, "prompt", ""),
            INVALID,
            "FIELD_INVALID",
            "prompt: must not be empty",
        ),
        (lambda r: r.ClearField("prompt"), "INVALID_ARGUMENT", "FIELD_INVALID", "input: give one of prompt"),
        (
            lambda r: setattr(r, "priority", 9),
            INVALID,
            "FIELD_INVALID",
            "priority: 9 is no priority",
        ),
        (
            lambda r: setattr(r.sampling, "temperature", float("nan")),
            INVALID,
            "FIELD_INVALID",
            "sampling.temperature: must be from 0 to 2, not nan",
        ),
        (
            lambda r: setattr(r.stop, "max_new_tokens", 10_000),
            INVALID,
            "CONTEXT_LENGTH_EXCEEDED",
            "context of 512 tokens",
        ),
        (
            lambda r: setattr(r, "prompt", "x" * (10 << 20)),
            INVALID,
            "REQUEST_TOO_LARGE",
            "10485760 bytes of text; at most 4194304",
        ),
        (
            lambda r: r.prompt_token_ids.ids.append(600),
            INVALID,
            "FIELD_INVALID",
            "prompt_token_ids: 600 is outside",
        ),
    ],
)
async def test_bad_input_is_refused_with_its_field_and_nothing_is_sent(house, change, code, reason, says):
    request = prompt()
    change(request)
    got_code, error = await refusal(house, request)
    assert (got_code.name, error.reason) == (code, reason)
    assert says in error.message
    assert house.worker.requests == []


async def test_every_problem_is_a_field_violation(house):
    request = prompt("")
    request.sampling.top_p = 7
    request.output.choice_count = 40
    _, error = await refusal(house, request)
    assert [field for field, _ in error.violations] == ["prompt", "sampling.top_p", "output.choice_count"]


async def test_tokens_are_counted_without_running(house):
    counted = await house.stub.CountTokens(pb.CountTokensRequest(model="tiny", prompt="Paris is"))
    assert (counted.tokens, counted.context_length) == (len(TOKENIZER.encode("Paris is").ids), 512)
    chat = pb.CountTokensRequest(model="tiny")
    chat.chat.messages.add(role="user", content="Hi")
    assert (await house.stub.CountTokens(chat)).tokens > 5
    assert house.worker.requests == []
    with pytest.raises(grpc.aio.AioRpcError, match="give one of prompt"):
        await house.stub.CountTokens(pb.CountTokensRequest(model="tiny"))


async def test_models_are_listed_and_described(house):
    listed = (await house.stub.ListModels(pb.ListModelsRequest())).models
    assert [(m.name, m.has_chat_template, m.context_length) for m in listed] == [
        ("plain", False, 512),
        ("tiny", True, 512),
    ]
    described = (await house.stub.GetModel(pb.GetModelRequest(model="tiny@stable"))).model
    assert described == listed[1]
    assert described.version == "tiny@" + described.aliases["stable"]


async def test_a_new_model_can_be_used_as_soon_as_the_modelstore_says_so(house):
    with pytest.raises(grpc.aio.AioRpcError):
        await house.stub.GetModel(pb.GetModelRequest(model="fresh"))
    house.modelstore.add("fresh", {"tokenizer.json": TOKENIZER.to_str().encode()})
    await house.catalogue_changed()
    request = prompt()
    request.model = "fresh"
    assert text_of(await answer(house, request)) == SENTENCE


async def test_known_models_work_while_the_modelstore_is_away(house):
    await answer(house, prompt())
    await house.modelstore.stop()
    assert text_of(await answer(house, prompt())) == SENTENCE


async def test_a_tokenizer_that_is_not_what_its_digest_says_is_refused(house):
    version = house.modelstore.add("broken", {"tokenizer.json": TOKENIZER.to_str().encode() + b" "})
    files = house.modelstore.models["broken"].versions[0].manifest.files
    house.modelstore.blobs[files[0].digest] = b"{}"
    await house.catalogue_changed()
    request = prompt()
    request.model = f"broken@{version}"
    _, error = await refusal(house, request)
    assert (error.reason, error.metadata["digest"]) == ("DIGEST_MISMATCH", files[0].digest)
    assert text_of(await answer(house, prompt())) == SENTENCE


async def test_a_tokenizer_is_fetched_once_for_many_requests(house):
    await asyncio.gather(*[answer(house, prompt()) for _ in range(20)])
    files = {f.digest for m in house.modelstore.models.values() for f in m.versions[0].manifest.files}
    assert house.modelstore.fetches <= 4 + len(files)


async def test_reflection_names_the_service(house):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{house.gateway.grpc_port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="loom.inference.v1.InferenceService"
        )
        reply = await stub.ServerReflectionInfo(iter([ask])).read()
    proto = FileDescriptorProto.FromString(reply.file_descriptor_response.file_descriptor_proto[0])
    assert proto.package == "loom.inference.v1"


async def test_a_gateway_that_drains_refuses_new_requests_and_ends_those_it_has(house):
    house.gateway.pipeline.draining = True
    code, error = await refusal(house, prompt())
    assert (code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert house.gateway.readiness() == "draining"
