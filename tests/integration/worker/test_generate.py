"""Generate over a real socket, with a real engine process that simulates."""

from __future__ import annotations

import grpc
import pytest
from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2

from services.worker.sim.law import token_at
from tests.integration.worker.harness import VERSION, run_worker
from tokenloom.kit.errors import CallError


async def test_tokens_arrive_in_order_with_started_first_and_finished_last() -> None:
    async with run_worker() as worker:
        messages = await worker.client.messages(worker.client.request())
        assert messages[0].HasField("started")
        assert messages[0].tokens.token_ids
        assert not any(message.HasField("started") for message in messages[1:])
        assert [i for m in messages for i in range(m.tokens.index, m.tokens.index + len(m.tokens.token_ids))]
        tokens = [token for message in messages for token in message.tokens.token_ids]
        assert tokens == [token_at(7, 2 + n, 512) for n in range(16)]
        finished = messages[-1].finished
        assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 16)
        assert finished.usage.computed_prompt_tokens == 2
        assert finished.timings.steps == 16


async def test_response_headers_name_the_worker_and_trailers_carry_usage() -> None:
    async with run_worker(advertise="10.1.2.3:9100") as worker:
        call = worker.client.start(worker.client.request())
        messages = [message async for message in call]
        assert dict(await call.initial_metadata())["x-loom-worker"] == "10.1.2.3:9100"
        assert messages[0].started.worker == "10.1.2.3:9100"
        usage = worker_pb2.Usage.FromString(dict(await call.trailing_metadata())["x-loom-usage-bin"])
        assert usage.completion_tokens == 16


async def test_resume_continues_identically() -> None:
    async with run_worker() as worker:
        whole = await worker.client.tokens(worker.client.request())
        rest = await worker.client.messages(worker.client.request(output_token_ids=whole[:5]))
        assert rest[0].tokens.index == 5
        assert whole[:5] + [t for m in rest for t in m.tokens.token_ids] == whole
        assert rest[-1].finished.usage.completion_tokens == 16


async def test_a_prompt_finds_what_an_earlier_one_left_but_not_under_another_salt() -> None:
    async with run_worker() as worker:
        prompt = list(range(100, 200))
        for salt, cached in (("", 0), ("", 96), ("other", 0), ("other", 96)):
            request = worker.client.request(prompt_token_ids=prompt, cache_salt=salt)
            messages = await worker.client.messages(request)
            usage = messages[-1].finished.usage
            assert messages[0].started.cached_prompt_tokens == usage.cached_prompt_tokens == cached
            assert usage.computed_prompt_tokens == 100 - cached
        report = await worker.client.report_when(lambda r: r.models[0].prefix_queried_tokens == 400)
        assert report.models[0].prefix_hit_tokens == 2 * 96
        assert report.models[0].cached_blocks >= 2 * 6


async def test_stop_token_ends_the_sequence_and_is_its_last_token() -> None:
    async with run_worker() as worker:
        whole = await worker.client.tokens(worker.client.request(max_new_tokens=64))
        stop = whole[9]
        end = whole.index(stop)
        messages = await worker.client.messages(
            worker.client.request(max_new_tokens=64, stop_token_ids=[stop])
        )
        assert [t for m in messages for t in m.tokens.token_ids] == whole[: end + 1]
        assert messages[-1].finished.stop_token_id == stop
        assert messages[-1].finished.reason == inference_pb2.FINISH_REASON_STOP


async def test_logprobs_come_with_each_token() -> None:
    async with run_worker() as worker:
        messages = await worker.client.messages(worker.client.request(logprobs=True, top_logprobs=3))
        entries = [entry for message in messages for entry in message.tokens.logprobs]
        assert len(entries) == 16
        assert all(len(entry.top) == len(entry.top_token_ids) == 3 for entry in entries)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [512]}, "prompt_token_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 17}, "min_new_tokens"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"priority": 9}, "priority"),
        ({"sampling": inference_pb2.SamplingParams(seed=1, temperature=-1)}, "sampling.temperature"),
        ({"sampling": inference_pb2.SamplingParams(seed=1, top_p=float("nan"))}, "sampling.top_p"),
        ({"sampling": inference_pb2.SamplingParams()}, "sampling.seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"output_token_ids": [1] * 16}, "output_token_ids"),
    ],
)
async def test_wrong_field_is_named(fields: dict[str, object], named: str) -> None:
    async with run_worker() as worker:
        with pytest.raises(CallError) as caught:
            await worker.client.messages(worker.client.request(**fields))
        assert caught.value.reason == "FIELD_INVALID"
        assert named in [field for field, _ in caught.value.violations]


async def test_wrong_request_leaves_the_worker_serving() -> None:
    async with run_worker() as worker:
        with pytest.raises(CallError, match="not resident") as missing:
            await worker.client.messages(worker.client.request(model_version=f"sha256:{'b' * 64}"))
        assert missing.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(CallError) as long:
            await worker.client.messages(worker.client.request(max_new_tokens=8191))
        assert long.value.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert long.value.metadata["context_length"] == "8192"
        garbage = worker.channel.unary_stream("/loom.worker.v1.WorkerService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as malformed:
            await garbage(b"\xff\xff\xff").read()
        assert malformed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(await worker.client.tokens(worker.client.request())) == 16
        report = await worker.client.report_when(lambda r: True)
        assert report.models[0].version == VERSION
        assert report.models[0].free_sequences == 64
