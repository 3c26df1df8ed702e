"""Envoy's external-processing messages, and what they mean to the batcher.

The pick travels as a header and as dynamic metadata, as the endpoint-picker convention asks. A
refusal is an immediate response that a gRPC caller sees as a status with details.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.message import DecodeError
from loom.worker.v1 import worker_pb2

from services.batcher.core.messages import Dispatch, Reject, Request, Usage
from tokenloom.contract import headers as names
from tokenloom.contract.headers import HeaderError, RequestHeaders
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import STATUS_DETAILS_KEY, CallError, field_invalid, status_proto

ENDPOINTS_MAX = 10_000
"""Workers whose part of a pick is kept."""
HOLD_MARGIN_S = 5.0
"""Envoy waits this much longer than the core holds: the refusal must arrive before Envoy gives up."""

# The values of x-llm-d-request-dropped-reason that the convention knows.
DROPPED = {
    "QUEUE_FULL": "rejected-saturated",
    "NO_CAPACITY": "rejected-no-endpoints",
    "QUEUE_TIMEOUT": "rejected-ttl-expired",
    "DEADLINE_UNREACHABLE": "rejected-ttl-expired",
    "DRAINING": "rejected-shutting-down",
    "TENANT_OVER_SHARE": "rejected-saturated",
    "MODEL_NOT_READY": "rejected-no-endpoints",
    "MODEL_MEMORY_BUSY": "rejected-no-endpoints",
    "SHED": "evicted-priority",
}

_OVERWRITE = base_pb2.HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD

_GO_ON = {
    "response_headers": pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString(),
    "response_trailers": pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString(),
    "request_body": pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString(),
    "response_body": pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString(),
    "request_trailers": pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString(),
}


def pairs(headers: base_pb2.HeaderMap) -> dict[str, str | bytes]:
    """Ours of Envoy's headers; `-bin` values are their base64 text."""
    return {
        header.key: header.raw_value.decode("utf-8", "replace")
        for header in headers.headers
        if header.key.startswith(names.PREFIX)
    }


def parse_request(message: pb.ProcessingRequest, clock: Clock) -> Request:
    """What the core must know, from the first message of a stream.

    Raises CallError naming the header that is wrong.
    """
    try:
        parsed = RequestHeaders.parse(pairs(message.request_headers.headers))
    except HeaderError as error:
        raise field_invalid((error.field, error.why)) from None
    left_s = (parsed.deadline_unix_ms - clock.unix_ms()) / 1000
    return Request(
        request_id=parsed.request_id,
        model=parsed.model,
        tenant=parsed.tenant,
        priority=parsed.priority,
        arrival_unix_ms=parsed.arrival_unix_ms,
        deadline=clock.monotonic() + left_s,
        prompt_tokens=parsed.prompt_tokens,
        max_new_tokens=parsed.max_new_tokens,
        attempt=parsed.attempt,
        prefix=parsed.prefix,
        deadline_unix_ms=parsed.deadline_unix_ms,
        ttft_slo_ms=parsed.ttft_slo_ms,
        size_bytes=parsed.size_bytes,
        model_bytes=parsed.model_bytes,
    )


def served_by(headers: base_pb2.HeaderMap) -> str:
    """The endpoint that answered; empty when the response does not say."""
    for header in headers.headers:
        if header.key == names.WORKER:
            return str(header.raw_value, "ascii", "replace")
    return ""


def usage(trailers: base_pb2.HeaderMap) -> Usage | None:
    """What the worker says the request cost; None when it does not, or not readably."""
    for header in trailers.headers:
        if header.key == names.USAGE_BIN:
            try:
                value = header.raw_value
                data = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
                cost = worker_pb2.Usage.FromString(data)
            except (ValueError, DecodeError):
                return None
            cached = min(cost.cached_prompt_tokens, cost.prompt_tokens)
            return Usage(cost.prompt_tokens, cached, cost.completion_tokens)
    return None


def hold(seconds: float) -> bytes:
    """Asks Envoy to wait for the decision."""
    response = pb.ProcessingResponse()
    response.override_message_timeout.FromMilliseconds(round((seconds + HOLD_MARGIN_S) * 1000))
    return bytes(response.SerializeToString())


def pick(decision: Dispatch) -> bytes:
    """Send the request to the endpoint that was chosen."""
    response = pb.ProcessingResponse()
    headers = response.request_headers.response.header_mutation.set_headers
    _set(headers, names.LEASE, decision.lease_id.encode())
    _set(headers, names.QUEUED_MS, b"%d" % round(decision.waited_s * 1000))
    # Messages one behind the other are one message: what depends on the worker alone is made once.
    return _pick_of(decision.endpoint) + bytes(response.SerializeToString())


@lru_cache(maxsize=ENDPOINTS_MAX)
def _pick_of(endpoint: str) -> bytes:
    """The part of a pick that every pick of this worker has."""
    response = pb.ProcessingResponse()
    mutation = response.request_headers.response.header_mutation
    _set(mutation.set_headers, names.DESTINATION, endpoint.encode())
    mutation.remove_headers.append(names.PREFIX_BIN)
    lb = response.dynamic_metadata.fields["envoy.lb"].struct_value
    lb.fields[names.DESTINATION].string_value = endpoint
    return bytes(response.SerializeToString())


def go_on(message: pb.ProcessingRequest) -> bytes:
    """The answer that changes nothing. A message without one holds the request up until Envoy's
    `message_timeout`.
    """
    answer: bytes = _GO_ON.get(message.WhichOneof("request"), b"")
    return answer


def refuse(error: CallError) -> bytes:
    """Answer the caller now."""
    status = status_proto(error)
    response = pb.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = error.http_status
    immediate.grpc_status.status = status.code
    immediate.body = status.message.encode()
    details = base64.b64encode(status.SerializeToString()).rstrip(b"=")
    _set(immediate.headers.set_headers, STATUS_DETAILS_KEY, details)
    if error.reason in DROPPED:
        _set(immediate.headers.set_headers, names.DROPPED_REASON, DROPPED[error.reason].encode())
    return bytes(response.SerializeToString())


def _set(headers: Any, key: str, value: bytes) -> None:
    """One more header of a mutation, in place of what may be there."""
    headers.add(append_action=_OVERWRITE, header=base_pb2.HeaderValue(key=key, raw_value=value))


def refusal(decision: Reject) -> CallError:
    """The core's refusal as the error that travels."""
    return CallError(
        decision.reason, decision.message, metadata=decision.metadata, retry_after_s=decision.retry_after_s
    )
