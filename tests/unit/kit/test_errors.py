"""The error table: every reason survives the wire, and foreign statuses become the nearest of ours."""

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.kit.errors import REASONS, CallError, field_invalid, from_status, status_proto


@given(
    reason=st.sampled_from(sorted(REASONS)),
    message=st.text(max_size=200),
    metadata=st.dictionaries(st.text(min_size=1, max_size=10), st.text(max_size=20), max_size=3),
    retry=st.none() | st.floats(0, 3600),
)
def test_error_survives_the_wire(reason, message, metadata, retry):
    sent = CallError(reason, message, metadata=metadata, retry_after_s=retry)
    data = status_proto(sent).SerializeToString()
    got = from_status(status_pb2.Status.FromString(data))
    assert (got.reason, got.message, got.metadata) == (reason, message, metadata)
    assert got.code is sent.code
    assert got.retry_after_s == (None if retry is None else pytest.approx(retry, abs=1e-6))


def test_every_reason_has_a_grpc_code_an_http_status_and_a_type():
    for reason, spec in REASONS.items():
        error = CallError(reason, "x")
        assert error.code is not grpc.StatusCode.OK, reason
        assert 400 <= spec.http_status < 600, reason
        assert spec.http_type, reason


def test_a_callers_mistake_is_never_internal_or_unknown():
    for reason, spec in REASONS.items():
        if spec.http_type == "invalid_request_error":
            assert CallError(reason, "x").code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (
                reason
            )


def test_violations_name_each_field():
    got = from_status(status_proto(field_invalid(("top_p", "must be at most 1"), ("seed", "is negative"))))
    assert got.violations == (("top_p", "must be at most 1"), ("seed", "is negative"))
    assert "top_p: must be at most 1" in got.message


def test_unknown_reason_is_refused():
    with pytest.raises(KeyError):
        CallError("NO_SUCH_REASON", "x")


@pytest.mark.parametrize(
    ("code", "message", "reason", "retriable"),
    [
        (14, "connection refused", "SERVICE_UNAVAILABLE", True),
        (13, "Received RST_STREAM with error code 2", "ENGINE_RESTARTED", True),
        (13, "boom", "INTERNAL", False),
        (4, "", "DEADLINE_EXCEEDED", False),
        (2, "", "INTERNAL", False),
        (8, "too many requests", "QUEUE_FULL", True),
        (8, "CLIENT: Received message larger than max (9 vs. 4)", "REQUEST_TOO_LARGE", False),
        (8, "SERVER: Sent message larger than max (9 vs. 4)", "REQUEST_TOO_LARGE", False),
        (8, "received initial metadata size exceeds hard limit", "REQUEST_TOO_LARGE", False),
    ],
)
def test_status_without_details_becomes_the_nearest_reason(code, message, reason, retriable):
    error = from_status(status_pb2.Status(code=code, message=message))
    assert (error.reason, error.retriable) == (reason, retriable)
