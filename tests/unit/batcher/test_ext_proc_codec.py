"""Envoy's messages to the core's words and back, with the real protobuf classes."""

import base64
from pathlib import Path

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.rpc import status_pb2
from loom.worker.v1 import worker_pb2

from services.batcher.adapters import ext_proc
from services.batcher.core.messages import Dispatch, Reject, Usage
from tests.unit.batcher.words import MODEL, request
from tokenloom.contract import headers as names
from tokenloom.contract.headers import RequestHeaders
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import REASONS, CallError, from_status

OVERWRITE = base_pb2.HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


def header_map(pairs):
    values = [
        base_pb2.HeaderValue(key=k, raw_value=v if isinstance(v, bytes) else v.encode()) for k, v in pairs
    ]
    return base_pb2.HeaderMap(headers=values)


def first_message(clock, **changes):
    values = {
        "request_id": "r-1",
        "arrival_unix_ms": 123,
        "deadline_unix_ms": clock.unix_ms() + 2_500,
        "model": MODEL,
        "tenant": "acme",
        "priority": 3,
        "prompt_tokens": 40,
        "max_new_tokens": 8,
        "prefix": (0x3736353433323130, 0xFEDCBA9876543210),
        "attempt": 2,
        "ttft_slo_ms": 250,
        "size_bytes": 4096,
        "model_bytes": 270_000_000,
    }
    pairs = [(":path", "/x"), ("user-agent", b"\xff\xfe")]
    for key, value in RequestHeaders(**(values | changes)).encode():
        pairs.append((key, base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value))
    return pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=header_map(pairs)))


def without(message, name):
    kept = [h for h in message.request_headers.headers.headers if h.key != name]
    return pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=base_pb2.HeaderMap(headers=kept)))


def set_headers(mutation):
    assert all(option.append_action == OVERWRITE for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value for option in mutation.set_headers}


def test_request_headers_become_a_request_on_the_cores_clock():
    clock = FakeClock()
    parsed = ext_proc.parse_request(first_message(clock), clock)
    assert parsed.deadline == pytest.approx(clock.monotonic() + 2.5)
    assert parsed._replace(deadline=0.0) == (
        "r-1", MODEL, "acme", 3, 123, 0.0, 40, 8, 2, (0x3736353433323130, 0xFEDCBA9876543210),
        clock.unix_ms() + 2_500, 250, 4096, 270_000_000,
    )  # fmt: skip


def test_prefixes_are_the_headers_bytes_read_as_little_endian_numbers():
    clock = FakeClock()
    message = without(first_message(clock), names.PREFIX_BIN)
    value = base64.b64encode(b"01234567" + b"\1" + bytes(7))
    message.request_headers.headers.headers.add(key=names.PREFIX_BIN, raw_value=value)
    assert ext_proc.parse_request(message, clock).prefix == (int.from_bytes(b"01234567", "little"), 1)


def test_a_request_needs_no_wish_no_size_and_no_prefix():
    clock = FakeClock()
    parsed = ext_proc.parse_request(first_message(clock, prefix=(), ttft_slo_ms=0, size_bytes=0), clock)
    assert (parsed.prefix, parsed.ttft_slo_ms, parsed.size_bytes) == ((), 0, 0)


REQUIRED = (
    names.REQUEST_ID, names.ARRIVAL_UNIX_MS, names.DEADLINE_UNIX_MS, names.MODEL, names.TENANT,
    names.PRIORITY, names.PROMPT_TOKENS, names.MAX_NEW_TOKENS, names.ATTEMPT,
)  # fmt: skip


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_header_is_named(missing):
    clock = FakeClock()
    with pytest.raises(CallError) as caught:
        ext_proc.parse_request(without(first_message(clock), missing), clock)
    assert (caught.value.reason, caught.value.metadata) == ("FIELD_INVALID", {"field": missing})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (names.PROMPT_TOKENS, b"0"),
        (names.PROMPT_TOKENS, b"-1"),
        (names.PRIORITY, b"5"),
        (names.DEADLINE_UNIX_MS, b"soon"),
        (names.TENANT, b""),
        (names.REQUEST_ID, b"x" * 129),
        (names.PREFIX_BIN, b"###"),
        (names.PREFIX_BIN, base64.b64encode(b"seven77")),
        (names.TTFT_SLO_MS, b"0"),
        (names.BYTES, b"many"),
        (names.ARRIVAL_UNIX_MS, b"\xff\xff"),
    ],
)
def test_a_header_out_of_bounds_is_named(name, value):
    clock = FakeClock()
    message = without(first_message(clock), name)
    message.request_headers.headers.headers.add(key=name, raw_value=value)
    with pytest.raises(CallError) as caught:
        ext_proc.parse_request(message, clock)
    assert caught.value.metadata == {"field": name}
    assert caught.value.code.value[0] == 3


def test_a_message_that_is_no_request_is_refused_by_name_too():
    with pytest.raises(CallError, match=names.REQUEST_ID):
        ext_proc.parse_request(pb.ProcessingRequest(response_headers=pb.HttpHeaders()), FakeClock())


def sent(data):
    """What Envoy reads."""
    return pb.ProcessingResponse.FromString(data)


def whole_pick(endpoint, lease_id, queued_ms):
    """The oracle: a pick built as one message."""
    response = pb.ProcessingResponse()
    mutation = response.request_headers.response.header_mutation
    for key, value in ((names.DESTINATION, endpoint), (names.LEASE, lease_id), (names.QUEUED_MS, queued_ms)):
        option = mutation.set_headers.add(append_action=2)
        option.header.key, option.header.raw_value = key, value.encode()
    mutation.remove_headers.append(names.PREFIX_BIN)
    lb = response.dynamic_metadata.fields["envoy.lb"].struct_value
    lb.fields[names.DESTINATION].string_value = endpoint
    return response


def test_a_pick_put_together_from_parts_is_the_pick_built_as_one_message():
    for endpoint, lease in (("10.0.0.7:9100", "a-1"), ("[fd00::1]:9100", "a-2"), ("10.0.0.7:9100", "a-3")):
        data = ext_proc.pick(Dispatch(1, request(), endpoint, lease, 0.0))
        assert sent(data) == whole_pick(endpoint, lease, "0")


def test_a_pick_travels_as_headers_and_as_dynamic_metadata():
    response = sent(ext_proc.pick(Dispatch(1, request(), "10.0.0.7:9100", "lease-1", 1.2344)))
    mutation = response.request_headers.response.header_mutation
    assert set_headers(mutation) == {
        names.DESTINATION: b"10.0.0.7:9100",
        names.LEASE: b"lease-1",
        names.QUEUED_MS: b"1234",
    }
    assert list(mutation.remove_headers) == [names.PREFIX_BIN]
    lb = response.dynamic_metadata.fields["envoy.lb"].struct_value
    assert lb.fields[names.DESTINATION].string_value == "10.0.0.7:9100"


def test_envoy_is_asked_to_wait_a_little_longer_than_the_core_holds():
    response = sent(ext_proc.hold(12.5))
    assert response.override_message_timeout.ToMilliseconds() == 17_500
    assert response.WhichOneof("response") is None


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_refusal_decodes_to_the_same_error(reason):
    error = CallError(reason, "why, and the cure: ä", metadata={"queue": "q"}, retry_after_s=1.5)
    immediate = sent(ext_proc.refuse(error)).immediate_response
    added = set_headers(immediate.headers)
    details = added["grpc-status-details-bin"]
    assert b"=" not in details
    decoded = from_status(
        status_pb2.Status.FromString(base64.b64decode(details + b"=" * (-len(details) % 4)))
    )
    assert (decoded.reason, decoded.message, decoded.metadata) == (reason, error.message, error.metadata)
    assert decoded.retry_after_s == 1.5
    assert immediate.grpc_status.status == error.code.value[0]
    assert immediate.status.code == error.http_status
    assert immediate.body.decode() == error.message
    assert (names.DROPPED_REASON in added) == (reason in ext_proc.DROPPED)


def test_what_a_dropped_request_is_called_is_what_the_page_says():
    page = (Path(__file__).parents[3] / "docs/reference/scheduling.md").read_text()
    rows = [
        [cell.strip() for cell in row.strip("| ").split(" | ")] for row in page.splitlines() if row[:1] == "|"
    ]
    told = {row[0]: row[2] for row in rows if len(row) == 3 and row[2].startswith(("rejected-", "evicted-"))}
    assert told == ext_proc.DROPPED


def test_a_refusal_of_the_core_keeps_its_words():
    reject = Reject(1, request(), "QUEUE_FULL", "full", {"queue": "q", "limit": "1"}, 2.0, 0.0)
    error = ext_proc.refusal(reject)
    assert (error.reason, error.message, error.metadata) == ("QUEUE_FULL", "full", reject.metadata)
    assert error.retry_after_s == 2.0


def test_the_worker_that_answered_is_read_from_its_header():
    assert ext_proc.served_by(header_map([("x", "y"), (names.WORKER, "10.0.0.7:9100")])) == "10.0.0.7:9100"
    assert ext_proc.served_by(header_map([(":status", "503")])) == ""


@pytest.mark.parametrize("padding", [True, False])
def test_usage_is_read_from_the_trailer(padding):
    cost = worker_pb2.Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=3)
    value = base64.b64encode(cost.SerializeToString())
    trailers = header_map([(names.USAGE_BIN, value if padding else value.rstrip(b"="))])
    assert ext_proc.usage(trailers) == Usage(10, 4, 3)


@pytest.mark.parametrize("value", [b"*", b"A", base64.b64encode(b"\xff\xff\xff")])
def test_an_unreadable_usage_is_no_usage(value):
    assert ext_proc.usage(header_map([(names.USAGE_BIN, value)])) is None
    assert ext_proc.usage(header_map([])) is None


def test_more_cached_than_prompt_tokens_are_not_believed():
    cost = worker_pb2.Usage(prompt_tokens=1, cached_prompt_tokens=4)
    trailers = header_map([(names.USAGE_BIN, base64.b64encode(cost.SerializeToString()))])
    assert ext_proc.usage(trailers) == Usage(1, 1, 0)


@pytest.mark.parametrize(
    "kind", ["response_headers", "response_trailers", "request_body", "response_body", "request_trailers"]
)
def test_every_later_message_has_an_answer_of_its_kind(kind):
    message = pb.ProcessingRequest()
    getattr(message, kind).SetInParent()
    assert sent(ext_proc.go_on(message)).WhichOneof("response") == kind
