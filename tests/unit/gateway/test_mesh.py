"""The worker's contract, both ways, and what each way of failing means."""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from hypothesis import given
from hypothesis import strategies as st
from loom.worker.v1 import worker_pb2

from services.gateway.adapters.mesh import _headers, failure_of, from_proto, to_proto
from services.gateway.core.plan import FilledSampling
from services.gateway.core.request import Finish
from services.gateway.core.retry import RESENT_REASONS
from tests.unit.gateway.test_runner import request
from tokenloom.contract.headers import MODEL_BYTES_MAX, RequestHeaders
from tokenloom.kit.errors import STATUS_DETAILS_KEY, CallError, status_proto

CODE = grpc.StatusCode


def rpc_error(code, details="", error=None):
    trailers = [] if error is None else [(STATUS_DETAILS_KEY, status_proto(error).SerializeToString())]
    return AioRpcError(code, Metadata(), Metadata(*trailers), details)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CODE.UNAVAILABLE, "SERVICE_UNAVAILABLE"),
        (CODE.UNIMPLEMENTED, "SERVICE_UNAVAILABLE"),
        (CODE.PERMISSION_DENIED, "SERVICE_UNAVAILABLE"),
        (CODE.INTERNAL, "ENGINE_RESTARTED"),
        (CODE.UNKNOWN, "ENGINE_RESTARTED"),
        (CODE.CANCELLED, "ENGINE_RESTARTED"),
        (CODE.RESOURCE_EXHAUSTED, "WORKER_FULL"),
    ],
)
def test_a_status_without_details_comes_from_the_way_and_is_sent_again(code, reason):
    error = failure_of(rpc_error(code, "upstream connect error"))
    assert error.reason == reason
    assert error.reason in RESENT_REASONS
    assert error.retriable


def test_a_passed_deadline_is_not_sent_again():
    assert not failure_of(rpc_error(CODE.DEADLINE_EXCEEDED)).retriable


def test_a_message_above_grpcs_own_bound_is_not_sent_again():
    details = "CLIENT: Received message larger than max (20000000 vs. 16777216)"
    error = failure_of(rpc_error(CODE.RESOURCE_EXHAUSTED, details))
    assert (error.reason, error.message, error.retriable) == ("REQUEST_TOO_LARGE", details, False)


def test_a_status_with_details_is_taken_at_its_word():
    sent = CallError("QUEUE_FULL", "full", metadata={"queue": "m"}, retry_after_s=2.0)
    error = failure_of(rpc_error(CODE.RESOURCE_EXHAUSTED, "full", sent))
    assert (error.reason, error.retry_after_s, error.metadata) == ("QUEUE_FULL", 2.0, {"queue": "m"})


def test_a_worker_that_does_not_hold_the_model_does_not_mean_that_there_is_none():
    error = failure_of(rpc_error(CODE.NOT_FOUND, "x", CallError("MODEL_NOT_FOUND", "not here")))
    assert error.reason == "MODEL_NOT_READY"
    assert error.retriable


def test_a_defect_of_the_workers_is_not_sent_again():
    error = failure_of(rpc_error(CODE.INTERNAL, "x", CallError("INTERNAL", "a defect")))
    assert not error.retriable


def test_a_request_travels_whole():
    sampling = FilledSampling(0.5, 0.9, 40, 0.1, 1.1, 0.2, 0.3, 7, {5: -1.0})
    sent = to_proto(request(sampling=sampling, seed=9, output_ids=(4,), stop_token_ids=(3,), logprobs=True))
    assert list(sent.prompt_token_ids) == [1, 2]
    assert list(sent.output_token_ids) == [4]
    assert sent.sampling.seed == 9
    assert sent.sampling.temperature == 0.5
    assert dict(sent.sampling.logit_bias) == {5: -1.0}
    assert all(sent.sampling.HasField(f.name) for f in sent.sampling.DESCRIPTOR.fields if f.has_presence)


@pytest.mark.parametrize(
    ("stated", "told"), [(269_000_000, 269_000_000), (0, 0), (MODEL_BYTES_MAX + 1, MODEL_BYTES_MAX)]
)
def test_the_size_of_the_weights_travels_where_it_is_known(stated, told):
    pairs = dict(_headers(request(model_bytes=stated), 100).encode())
    assert RequestHeaders.parse(pairs).model_bytes == told
    assert ("x-loom-model-bytes" in pairs) == (told > 0)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_every_message_is_read_in_full(ids, index, started, finished):
    message = worker_pb2.GenerateResponse()
    message.tokens.index = index
    message.tokens.token_ids.extend(ids)
    if started:
        message.started.worker = "w"
        message.started.cached_prompt_tokens = 3
    if finished:
        message.finished.reason = int(Finish.LENGTH)
        message.finished.timings.prefill_ns = 5
    read = from_proto(message)
    assert (read.index, read.token_ids) == (index, ids)
    assert (read.worker, read.cached_prompt_tokens) == (("w", 3) if started else (None, 0))
    assert (read.finish is not None) == finished
    if read.finish is not None:
        assert (read.finish.reason, read.finish.prefill_ns) == (Finish.LENGTH, 5)
        assert read.finish.stop_token_id is None
