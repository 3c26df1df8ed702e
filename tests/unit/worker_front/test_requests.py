"""Checking what comes over the wire, and writing what goes back."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.requests import tenant_of, to_response, to_submit
from services.worker.front.sequence import Batch
from services.worker.protocol import Output, Submit, TokenLogprobs
from tests.unit.worker_front.fakes import make_sequence
from tokenloom.contract.prefix import root_hash
from tokenloom.kit.errors import CallError

Params = inference_pb2.SamplingParams


def request(**fields: Any) -> pb.GenerateRequest:
    values: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "sampling": Params(seed=5),
        "max_new_tokens": 10,
    }
    return pb.GenerateRequest(**{**values, **fields})


def translate(message: pb.GenerateRequest) -> Submit:
    return to_submit(message, "k", context_length=100, vocab_size=50)


def violations(message: pb.GenerateRequest) -> list[str]:
    with pytest.raises(CallError) as caught:
        translate(message)
    assert caught.value.reason == "FIELD_INVALID"
    return [field for field, _ in caught.value.violations]


def test_absent_sampling_fields_take_the_contract_defaults() -> None:
    sampling = translate(request()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    assert (sampling.seed, sampling.logprobs, sampling.logit_bias) == (5, -1, {})


def test_every_field_reaches_the_engine() -> None:
    sampling = Params(seed=2**64 - 1, temperature=0, top_k=7, logit_bias={3: -100})
    message = request(
        output_token_ids=[4, 5],
        sampling=sampling,
        min_new_tokens=3,
        stop_token_ids=[9],
        logprobs=True,
        top_logprobs=2,
        priority=inference_pb2.PRIORITY_INTERACTIVE,
        cache_salt="s",
    )
    submit = translate(message)
    assert (submit.id, submit.prompt, submit.output, submit.stop_token_ids) == ("k", [1, 2, 3], [4, 5], [9])
    assert (submit.max_new_tokens, submit.min_new_tokens, submit.priority) == (10, 3, 1)
    assert (submit.sampling.seed, submit.sampling.temperature, submit.sampling.top_k) == (2**64 - 1, 0.0, 7)
    assert (submit.sampling.logit_bias, submit.sampling.logprobs) == ({3: -100.0}, 2)
    assert submit.prefix_root == root_hash(message.model_version, "s")
    assert translate(request()).prefix_root == root_hash(message.model_version, "")


def test_unset_priority_is_standard_and_unset_tenant_is_default() -> None:
    assert translate(request()).priority == inference_pb2.PRIORITY_STANDARD
    assert tenant_of(request()) == "default"
    assert tenant_of(request(tenant="t")) == "t"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "naïve"}, "request_id"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [50]}, "prompt_token_ids"),
        ({"output_token_ids": [50]}, "output_token_ids"),
        ({"output_token_ids": [1] * 10}, "output_token_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 11}, "min_new_tokens"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"tenant": "t" * 129}, "tenant"),
        ({"cache_salt": "s" * 65}, "cache_salt"),
        ({"priority": 5}, "priority"),
        ({"priority": -1}, "priority"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"sampling": Params()}, "sampling.seed"),
        ({"sampling": Params(seed=1, temperature=2.5)}, "sampling.temperature"),
        ({"sampling": Params(seed=1, temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": Params(seed=1, top_p=0)}, "sampling.top_p"),
        ({"sampling": Params(seed=1, top_p=float("inf"))}, "sampling.top_p"),
        ({"sampling": Params(seed=1, min_p=-0.1)}, "sampling.min_p"),
        ({"sampling": Params(seed=1, repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": Params(seed=1, presence_penalty=-3)}, "sampling.presence_penalty"),
        ({"sampling": Params(seed=1, frequency_penalty=3)}, "sampling.frequency_penalty"),
        ({"sampling": Params(seed=1, top_k=51)}, "sampling.top_k"),
        ({"sampling": Params(seed=1, logit_bias={50: 1})}, "sampling.logit_bias"),
        ({"sampling": Params(seed=1, logit_bias={1: 101})}, "sampling.logit_bias"),
        ({"sampling": Params(seed=1, logit_bias={1: float("nan")})}, "sampling.logit_bias"),
        ({"sampling": Params(seed=1, logit_bias=dict.fromkeys(range(301), 0))}, "sampling.logit_bias"),
    ],
)
def test_field_outside_its_bounds_is_named(fields: dict[str, Any], named: str) -> None:
    assert named in violations(request(**fields))


def test_all_violations_come_in_one_answer() -> None:
    named = violations(request(request_id="", prompt_token_ids=[], max_new_tokens=0))
    assert {"request_id", "prompt_token_ids", "max_new_tokens"} <= set(named)


def test_context_must_hold_prompt_and_output() -> None:
    assert translate(request(max_new_tokens=97)).max_new_tokens == 97
    with pytest.raises(CallError, match="shorten") as long:
        translate(request(max_new_tokens=98))
    assert long.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert long.value.metadata == {"prompt_tokens": "3", "max_new_tokens": "98", "context_length": "100"}


@given(st.binary(max_size=200))
def test_no_bytes_that_parse_give_anything_but_a_submit_or_a_typed_refusal(data: bytes) -> None:
    message = pb.GenerateRequest()
    with suppress(DecodeError):
        message.ParseFromString(data)
    reason = ""
    try:
        translate(message)
    except CallError as error:
        reason = error.reason
    assert reason in ("", "FIELD_INVALID", "CONTEXT_LENGTH_EXCEEDED")


def test_response_carries_started_tokens_and_finished() -> None:
    sequence = make_sequence(prompt=3, output=2)
    sequence.received_ns, sequence.submitted_ns = 1_000, 1_500
    final = Output(
        sequence.key,
        [7],
        2,
        finish="stop",
        stop_token_id=7,
        cached_prompt_tokens=1,
        computed_prompt_tokens=4,
        waiting_ns=10,
        prefill_ns=20,
        decode_ns=30,
        steps=1,
        preemptions=0,
    )
    sequence.push(final, 2_000)
    batch = Batch(True, 2, [7], [TokenLogprobs(-0.5, [7, 8], [-0.5, -1.5])], final)
    response = to_response(batch, sequence, "1.2.3.4:9100")
    assert (response.started.worker, response.started.cached_prompt_tokens) == ("1.2.3.4:9100", 1)
    assert (response.tokens.index, list(response.tokens.token_ids)) == (2, [7])
    assert list(response.tokens.logprobs[0].top_token_ids) == [7, 8]
    finished = response.finished
    assert (finished.reason, finished.stop_token_id) == (inference_pb2.FINISH_REASON_STOP, 7)
    assert finished.usage == pb.Usage(
        prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=3, computed_prompt_tokens=4
    )
    assert finished.timings.waiting_ns == 510


def test_later_response_holds_tokens_only() -> None:
    response = to_response(Batch(False, 4, [1, 2], [], None), make_sequence(), "w")
    assert [field.name for field, _ in response.ListFields()] == ["tokens"]
    assert not response.tokens.logprobs
