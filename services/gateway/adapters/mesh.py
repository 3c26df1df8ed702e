"""Calls to workers, through the mesh's load balancer.

Translates one attempt into `loom.worker.v1` with its `x-loom-*` metadata, and everything that can go
wrong into a CallError. A status without details came from a proxy or from gRPC itself: what it says
about the worker's work is decided here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2

from services.gateway.core.choice import PositionLogprobs, WorkerFinish, WorkerMessage
from services.gateway.core.ports import SequenceRequest
from services.gateway.core.request import Finish
from tokenloom.contract.headers import MODEL_BYTES_MAX, RequestHeaders
from tokenloom.kit.channels import ChannelPool
from tokenloom.kit.errors import STATUS_DETAILS_KEY, CallError, from_rpc_error

GENERATE = "/loom.worker.v1.WorkerService/Generate"

_parse = worker_pb2.GenerateResponse.FromString
_NO_LOGPROBS: tuple[PositionLogprobs, ...] = ()

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_BROKE = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class GrpcMesh:
    """Implements `Mesh`; spreads calls over the pool's connections."""

    def __init__(self, pool: ChannelPool) -> None:
        self._pool = pool

    def generate(
        self, request: SequenceRequest, *, timeout_s: float, trace: Sequence[tuple[str, str]]
    ) -> GrpcWorkerStream:
        start: Any = self._pool.next().unary_stream(
            GENERATE, request_serializer=None, response_deserializer=None
        )
        # Serialised here and not by gRPC, for its size travels along.
        message = to_proto(request).SerializeToString()
        metadata = (*_headers(request, len(message)).encode(), *trace)
        return GrpcWorkerStream(start(message, metadata=metadata, timeout=timeout_s))


class GrpcWorkerStream:
    """Implements `WorkerStream` on one grpc.aio call."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._read = call.read

    async def read(self) -> WorkerMessage | None:
        try:
            data = await self._read()
            return None if data is _EOF else from_proto(_parse(data))
        except grpc.RpcError as error:
            raise failure_of(error) from None
        except DecodeError as error:
            raise CallError("ENGINE_RESTARTED", f"a worker's message cannot be read: {error}") from None

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # Cancelling twice is no error of anybody's.
            self._call.cancel()


def to_proto(request: SequenceRequest) -> worker_pb2.GenerateRequest:
    """The request as the worker's contract has it."""
    s = request.sampling
    return worker_pb2.GenerateRequest(
        request_id=request.request_id,
        model_version=request.model_version,
        prompt_token_ids=request.prompt_ids,
        output_token_ids=request.output_ids,
        sampling=inference_pb2.SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            seed=request.seed,
            logit_bias=s.logit_bias,
        ),
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        stop_token_ids=request.stop_token_ids,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        priority=cast("inference_pb2.Priority.ValueType", request.priority),
        cache_salt=request.cache_salt,
        tenant=request.tenant,
    )


def _headers(request: SequenceRequest, size_bytes: int) -> RequestHeaders:
    return RequestHeaders(
        request_id=request.request_id,
        arrival_unix_ms=request.arrival_unix_ms,
        deadline_unix_ms=request.deadline_unix_ms,
        model=request.model_version,
        tenant=request.tenant,
        priority=request.priority,
        prompt_tokens=len(request.prompt_ids) + len(request.output_ids),
        max_new_tokens=request.max_new_tokens,
        prefix=request.prefix,
        attempt=request.attempt,
        ttft_slo_ms=request.ttft_slo_ms,
        size_bytes=size_bytes,
        model_bytes=min(request.model_bytes, MODEL_BYTES_MAX),
    )


def from_proto(message: worker_pb2.GenerateResponse) -> WorkerMessage:
    """One message of the worker's as plain values."""
    tokens = message.tokens
    logprobs = tokens.logprobs
    read = WorkerMessage(
        tokens.index,
        [*tokens.token_ids],
        [PositionLogprobs(p.chosen, tuple(p.top_token_ids), tuple(p.top)) for p in logprobs]
        if logprobs
        else _NO_LOGPROBS,
        _finish(message.finished) if message.HasField("finished") else None,
        None,
        0,
    )
    if message.HasField("started"):
        read.worker = message.started.worker
        read.cached_prompt_tokens = message.started.cached_prompt_tokens
    return read


def _finish(finished: worker_pb2.Finished) -> WorkerFinish:
    timings = finished.timings
    return WorkerFinish(
        # A worker that ended without a reason ended by the model's own will.
        reason=Finish(finished.reason or Finish.STOP),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        waiting_ns=timings.waiting_ns,
        prefill_ns=timings.prefill_ns,
        decode_ns=timings.decode_ns,
    )


def failure_of(error: grpc.RpcError) -> CallError:
    """What a failed call means for its request."""
    call = cast(grpc.aio.AioRpcError, error)
    trailers = cast("Iterable[tuple[str, str | bytes]]", call.trailing_metadata() or ())
    if any(key == STATUS_DETAILS_KEY for key, _ in trailers):
        typed = from_rpc_error(error)
        if typed.reason != "MODEL_NOT_FOUND":
            return typed
        # The model exists, for its name was resolved: this worker only does not hold it.
        metadata = {"model": typed.metadata.get("model", "")}
        return CallError("MODEL_NOT_READY", f"no worker was ready: {typed}", metadata=metadata)
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallError("DEADLINE_EXCEEDED", "the deadline passed")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if (bound := from_rpc_error(error)).reason == "REQUEST_TOO_LARGE":
            return bound
        return CallError("WORKER_FULL", f"the mesh is full: {details}")
    if code in _BROKE:
        return CallError("ENGINE_RESTARTED", f"the stream broke: {code.name} {details}")
    return CallError(
        "SERVICE_UNAVAILABLE", f"no worker was reached: {details or code.name}", metadata={"service": "mesh"}
    )
