"""Typed errors: one exception here, `google.rpc.Status` with details on the wire, and back.

The table of reasons is the option on `loom.errors.v1.ErrorReason`; this module reads it and adds
nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from loom.errors.v1 import errors_pb2

DOMAIN = "tokenloom"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
MESSAGE_CHARS_MAX = 1024
"""Longer messages are cut: they travel in HTTP/2 headers."""

_ENUM_PREFIX = "ERROR_REASON_"
_CODES = {cast(int, code.value[0]): code for code in grpc.StatusCode}


def _read_table() -> dict[str, errors_pb2.ReasonSpec]:
    values = errors_pb2.ErrorReason.DESCRIPTOR.values
    return {
        v.name.removeprefix(_ENUM_PREFIX): v.GetOptions().Extensions[errors_pb2.spec]
        for v in values
        if v.number
    }


REASONS: Mapping[str, errors_pb2.ReasonSpec] = _read_table()
"""Every reason without its prefix, and how it travels."""

# What a status without our details stands for: it came from a proxy, from gRPC itself, or from a
# stream that was reset.
_REASON_OF_CODE = {
    grpc.StatusCode.UNAVAILABLE: "SERVICE_UNAVAILABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "QUEUE_FULL",
    grpc.StatusCode.INVALID_ARGUMENT: "REQUEST_MALFORMED",
    grpc.StatusCode.UNIMPLEMENTED: "FEATURE_UNSUPPORTED",
    grpc.StatusCode.UNAUTHENTICATED: "UNAUTHENTICATED",
    grpc.StatusCode.PERMISSION_DENIED: "PERMISSION_DENIED",
}

_TOO_LARGE_WORDS = ("message larger than max", "metadata size exceeds")


class CallError(Exception):
    """A refusal with a reason that programs can read.

    `reason` is a name of `loom.errors.v1.ErrorReason` without its prefix; the gRPC code and the HTTP
    status follow from it. Raises KeyError for a reason that the table does not hold.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        spec = REASONS[reason]
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.code: grpc.StatusCode = _CODES[spec.grpc_code]
        self.http_status: int = spec.http_status
        self.http_type: str = spec.http_type
        self.retriable: bool = spec.retriable

    def __repr__(self) -> str:
        return f"CallError({self.reason}, {self.message!r})"


def field_invalid(*violations: tuple[str, str]) -> CallError:
    """One error for every (field, what is wrong and how to mend it)."""
    message = "; ".join(f"{field}: {why}" for field, why in violations)
    metadata = {"field": violations[0][0]} if violations else {}
    return CallError("FIELD_INVALID", message, metadata=metadata, violations=violations)


def status_proto(error: CallError) -> status_pb2.Status:
    """The error as it travels."""
    status = status_pb2.Status(code=cast(int, error.code.value[0]), message=error.message[:MESSAGE_CHARS_MAX])
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad.field_violations.add(field=field, description=description[:MESSAGE_CHARS_MAX])
        status.details.add().Pack(bad)
    return status


def from_status(status: status_pb2.Status) -> CallError:
    """The error that `status_proto` made; a foreign status becomes the nearest reason of ours."""
    reason, metadata, violations, retry = "", {}, [], None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN and info.reason in REASONS:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            hint = error_details_pb2.RetryInfo()
            detail.Unpack(hint)
            retry = hint.retry_delay.ToNanoseconds() / 1e9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [(v.field, v.description) for v in bad.field_violations]
    if not reason:
        reason = _nearest_reason(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message)
    return CallError(reason, status.message, metadata=metadata, violations=violations, retry_after_s=retry)


def _nearest_reason(code: grpc.StatusCode, message: str) -> str:
    # A peer that dies mid-stream shows as INTERNAL "Received RST_STREAM ...": its work can be redone.
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message:
        return "ENGINE_RESTARTED"
    # gRPC's own bounds on sizes have this code too: sending the same again would not help.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and any(words in message for words in _TOO_LARGE_WORDS):
        return "REQUEST_TOO_LARGE"
    return _REASON_OF_CODE.get(code, "INTERNAL")


def from_rpc_error(error: grpc.RpcError) -> CallError:
    """What a failed call means, from its details where they came along, otherwise from its code."""
    call = cast(grpc.aio.AioRpcError, error)
    trailers = cast("Iterable[tuple[str, str | bytes]]", call.trailing_metadata() or ())
    for key, value in trailers:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                break
            if status.code:
                return from_status(status)
    code = call.code()
    return from_status(status_pb2.Status(code=cast(int, code.value[0]), message=call.details() or code.name))


def code_name(code: int) -> str:
    """`NOT_FOUND` for 5; the number as text when gRPC has no such code."""
    try:
        return cast(str, code_pb2.Code.Name(code))
    except ValueError:
        return str(code)
