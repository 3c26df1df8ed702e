"""The whole mesh with the real model: what callers see, and whether it is right."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from contextlib import suppress

import grpc
import openai
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loom.inference.v1 import inference_pb2 as pb

from tests.e2e.client import connected, greedy
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import from_rpc_error

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(real_mesh):
    with openai.OpenAI(base_url=f"{real_mesh.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_model_knows_the_capital_of_france(real_mesh):
    assert "Paris" in real_mesh.ok("generate", "What is the capital of France?", "--temperature", "0")


def test_every_process_but_the_engine_leaves_the_cores_to_whoever_computes(real_mesh):
    processes = real_mesh.status()
    (engine,) = processes["worker-0"]["children"]
    assert engine["name"] == "services.worker.engine"
    assert policies(engine["pid"]) == {os.SCHED_OTHER}
    for process in processes.values():
        assert policies(process["pid"]) == {os.SCHED_BATCH}, process["name"]


def policies(pid):
    """How the kernel schedules each thread of a process."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        # Threads come and go.
        with suppress(ProcessLookupError):
            found.add(os.sched_getscheduler(int(thread)))
    return found


def test_the_trace_shows_one_request_through_every_part(real_mesh):
    real_mesh.ok("generate", "Name one colour.", "--temperature", "0", "--max-tokens", "8")
    tree = json.loads(real_mesh.ok("trace", "--last", "--json"))
    spans = {s["span_id"]: s for s in tree["spans"]}
    edges = {
        (spans[s["parent_id"]]["service"], s["service"]) for s in spans.values() if s["parent_id"] in spans
    }
    assert {("edge", "gateway"), ("gateway", "mesh"), ("mesh", "batcher"), ("mesh", "worker")} <= edges
    names = {(s["service"], s["name"].split()[0]) for s in spans.values()}
    for service, name in [
        ("gateway", "chat"), ("gateway", "admission"), ("gateway", "tokenise"), ("gateway", "detokenise"),
        ("batcher", "queue"), ("batcher", "pick"), ("worker", "prefill"), ("worker", "decode"),
    ]:  # fmt: skip
        assert (service, name) in names
    assert len({s["trace_id"] for s in spans.values()}) == 1


def test_the_trace_is_drawn_as_a_tree(real_mesh):
    drawn = real_mesh.ok("trace", "--last")
    for part in ("edge", "gateway", "mesh", "batcher", "worker", "prefill", "decode"):
        assert part in drawn


def test_the_openai_client_streams_and_does_not(client):
    whole = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_completions_models_and_stop_strings(client):
    (model,) = client.models.list().data
    assert model.id == "smollm2"
    assert model.max_model_len == 8192
    prompt = "One, two, three, four, five, six,"
    free = client.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=24)
    cut = free.choices[0].text[3:6]
    held = client.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=24, stop=[cut])
    assert held.choices[0].text == free.choices[0].text.partition(cut)[0]
    assert held.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(client):
    def draw(seed):
        return client.completions.create(
            model="smollm2", prompt="Once upon a time", temperature=1.0, max_tokens=24, seed=seed
        )

    first, second, third = draw(1), draw(1), draw(2)
    assert first.choices[0].text == second.choices[0].text != third.choices[0].text


async def test_reflection_lists_the_services_at_the_public_port(real_mesh):
    channel = open_channel(real_mesh.target)
    try:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
    finally:
        await channel.close(None)
    names = {service.name for service in response.list_services_response.service}
    assert {"loom.inference.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_32_streams_at_once_get_nearly_every_token_alone(real_mesh):
    async with connected(real_mesh.target, 4) as client:
        answers = await client.generate_all([greedy(f"Number {i} is", 24, "smollm2") for i in range(32)])
    assert [a.error for a in answers] == [None] * 32
    assert [len(a.token_ids) for a in answers] == [24] * 32
    assert sum(a.deltas for a in answers) >= 0.9 * 32 * 24


async def refusal(client, request, timeout_s=30):
    answer = await client.generate(request, timeout_s)
    assert answer.error is not None
    assert answer.error.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return answer.error


BAD = [
    (lambda r: r.__setattr__("model", "nobody"), "MODEL_NOT_FOUND", "nobody"),
    (lambda r: r.__setattr__("prompt", ""), "FIELD_INVALID", "prompt"),
    (lambda r: r.__setattr__("prompt", "word " * 9000), "CONTEXT_LENGTH_EXCEEDED", "8192"),
    (lambda r: r.__setattr__("prompt", "x" * 10_000_000), "REQUEST_TOO_LARGE", "prompt"),
    (lambda r: r.sampling.__setattr__("temperature", -1), "FIELD_INVALID", "temperature"),
    (lambda r: r.sampling.__setattr__("top_p", 7), "FIELD_INVALID", "top_p"),
    (lambda r: r.stop.__setattr__("max_new_tokens", 0), "FIELD_INVALID", "max_new_tokens"),
]


@pytest.mark.parametrize(("spoil", "reason", "named"), BAD, ids=[f"{b[1]} {b[2]}" for b in BAD])
async def test_bad_requests_are_refused_by_name_over_grpc(real_mesh, spoil, reason, named):
    request = greedy("hello", 2, "smollm2")
    spoil(request)
    async with connected(real_mesh.target) as client:
        error = await refusal(client, request)
        assert error.reason == reason
        assert named in error.message
        assert (await client.generate(greedy("hello", 2, "smollm2"))).error is None


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x0a\x02\xc3\x28"], ids=["no message", "no UTF-8"]
)
async def test_bytes_that_are_no_request_are_refused(real_mesh, garbage):
    channel = open_channel(real_mesh.target)
    try:
        call = channel.unary_stream("/loom.inference.v1.InferenceService/Generate")(garbage)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    finally:
        await channel.close(None)
    assert from_rpc_error(caught.value).reason == "REQUEST_MALFORMED"


def post(mesh, path, body):
    request = urllib.request.Request(mesh.url + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


BODY = {"model": "smollm2", "prompt": "hello", "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({**BODY, "model": "nobody"}, 404, "nobody"),
        ({**BODY, "temperature": -1}, 400, "temperature"),
        ({**BODY, "top_k": -5}, 400, "top_k"),
        ({**BODY, "n": 1000}, 400, "n"),
        ({**BODY, "wibble": 1}, 400, "wibble"),
        ({**BODY, "prompt": ""}, 400, "prompt"),
        ({**BODY, "prompt": "x" * 10_000_000}, 413, "prompt"),
        ({**BODY, "best_of": 4}, 400, "best_of"),
        (b"{", 400, "JSON"),
        (b'{"model": "\xc3\x28"}', 400, "UTF-8"),
        (b"[]", 400, "object"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_requests_are_refused_by_name_over_http(real_mesh, body, status, named):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, answer = post(real_mesh, "/v1/completions", data)
    assert got == status, answer
    assert named in answer["error"]["message"]
    assert post(real_mesh, "/v1/completions", json.dumps(BODY).encode())[0] == 200


async def test_counting_tokens_agrees_with_usage(real_mesh):
    async with connected(real_mesh.target) as client:
        counted = await client.stub().CountTokens(
            pb.CountTokensRequest(model="smollm2", prompt="Hello there")
        )
        answer = await client.generate(greedy("Hello there", 1, "smollm2"))
    assert answer.finished.usage.prompt_tokens == counted.tokens
    assert counted.context_length == 8192


async def test_a_deadline_ends_a_stream_and_says_so(real_mesh):
    async with connected(real_mesh.target) as client:
        answer = await client.generate(greedy("hello", 4000, "smollm2"), timeout_s=0.5)
        assert answer.error.reason == "DEADLINE_EXCEEDED"
        await asyncio.sleep(0)
        assert (await client.generate(greedy("hello", 2, "smollm2"))).error is None
