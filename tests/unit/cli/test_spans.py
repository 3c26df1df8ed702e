"""OTLP becomes JSON lines in a bounded file, over a real connection too."""

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from tokenloom.cli.otlp import Receiver
from tokenloom.cli.spans import Span, SpanFile, from_line, from_otlp


def pair(key, **value):
    return KeyValue(key=key, value=AnyValue(**value))


def export(name="chat m", attributes=()):
    span = trace_pb2.Span(
        trace_id=bytes(range(16)),
        span_id=bytes(range(8)),
        parent_span_id=bytes(range(8, 16)),
        name=name,
        kind=trace_pb2.Span.SPAN_KIND_SERVER,
        start_time_unix_nano=10,
        end_time_unix_nano=30,
        attributes=attributes,
        status=trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR, message="no"),
        links=[trace_pb2.Span.Link(trace_id=b"\x01" * 16, span_id=b"\x02" * 8)],
    )
    resource = Resource(
        attributes=[
            pair("service.name", string_value="gateway"),
            pair("service.instance.id", string_value="g-1"),
        ]
    )
    scope = trace_pb2.ScopeSpans(spans=[span])
    return pb.ExportTraceServiceRequest(
        resource_spans=[trace_pb2.ResourceSpans(resource=resource, scope_spans=[scope])]
    )


def test_a_span_keeps_its_ids_times_service_status_links_and_every_kind_of_attribute():
    attributes = [
        pair("text", string_value="a"),
        pair("whole", int_value=3),
        pair("real", double_value=0.5),
        pair("yes", bool_value=True),
        pair("raw", bytes_value=b"\xff"),
        pair("list", array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(string_value="x")])),
        pair("nothing"),
    ]
    (span,) = from_otlp(export(attributes=attributes))
    assert span == Span(
        trace_id="000102030405060708090a0b0c0d0e0f",
        span_id="0001020304050607",
        parent_id="08090a0b0c0d0e0f",
        service="gateway",
        instance="g-1",
        name="chat m",
        kind="server",
        start_ns=10,
        end_ns=30,
        status="error",
        message="no",
        attributes={
            "text": "a",
            "whole": 3,
            "real": 0.5,
            "yes": True,
            "raw": "ff",
            "list": [1, "x"],
            "nothing": None,
        },
        links=["01" * 16 + "/" + "02" * 8],
    )
    assert from_line(span.to_line()) == span


def test_a_line_that_is_no_span_is_passed_over():
    assert [from_line(line) for line in ("", "{", "[]", '{"trace_id": "1"}', "3")] == [None] * 5


def test_the_file_is_set_aside_when_it_is_full_and_only_one_older_is_kept(tmp_path):
    path = tmp_path / "traces.jsonl"
    (span,) = from_otlp(export())
    line_bytes = len(span.to_line())
    file = SpanFile(path, bytes_max=2 * line_bytes)
    for _ in range(5):
        file.append([span])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["traces.jsonl", "traces.jsonl.1"]
    assert path.stat().st_size == line_bytes
    assert (tmp_path / "traces.jsonl.1").stat().st_size == 2 * line_bytes


async def test_what_is_exported_over_grpc_is_in_the_file_when_the_exporter_has_its_answer(tmp_path):
    path = tmp_path / "traces.jsonl"
    receiver = Receiver(path)
    port = await receiver.start(0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await rpc.TraceServiceStub(channel).Export(export(), timeout=5)
        assert [from_line(line).name for line in path.read_text().splitlines()] == ["chat m"]
    finally:
        await receiver.close()
