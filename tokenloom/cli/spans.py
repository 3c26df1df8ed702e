"""Spans as JSON lines in one bounded file: how OTLP becomes a line, and how the file is kept short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

FILE_BYTES_MAX = 32 * 1024 * 1024
"""One file's length; there are at most two, the second with the suffix `.1`."""

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
_STATUSES = {0: "unset", 1: "ok", 2: "error"}


@dataclass(frozen=True)
class Span:
    """One finished span. Times are nanoseconds since the epoch; ids are lower-case hex."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    instance: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    status: str = "unset"
    message: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    """`trace_id/span_id` of each span linked to."""

    def to_line(self) -> bytes:
        """One line of JSON, with its newline."""
        return msgspec.json.encode(self) + b"\n"


_decoder = msgspec.json.Decoder(Span)


def from_line(line: str | bytes) -> Span | None:
    """The span of one line, or None for a line that is no span (the last may be half-written)."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None


def from_otlp(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """Every span of one export."""
    for resource in request.resource_spans:
        about = _attributes(resource.resource.attributes)
        service = str(about.get("service.name", "unknown"))
        instance = str(about.get("service.instance.id", ""))
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _span(span, service, instance)


def _span(span: trace_pb2.Span, service: str, instance: str) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        service=service,
        instance=instance,
        name=span.name,
        kind=_KINDS.get(span.kind, "internal"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=_STATUSES.get(span.status.code, "unset"),
        message=span.status.message,
        attributes=_attributes(span.attributes),
        links=[f"{link.trace_id.hex()}/{link.span_id.hex()}" for link in span.links],
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case "array_value":
            return [_value(v) for v in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case "bytes_value":
            return value.bytes_value.hex()
        case None:
            return None
        case which:
            return getattr(value, which)


class SpanFile:
    """Appends spans; when the file is full it becomes `<name>.1`, and the one before that is dropped."""

    def __init__(self, path: Path, bytes_max: int = FILE_BYTES_MAX) -> None:
        self._path = path
        self._bytes_max = bytes_max

    def append(self, spans: Sequence[Span]) -> None:
        """Blocks on the disk. Whole lines in one write, so that a reader sees none torn but the last."""
        lines = b"".join(span.to_line() for span in spans)
        if self._size() + len(lines) > self._bytes_max:
            self._rotate()
        with self._path.open("ab", buffering=0) as file:
            file.write(lines)

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def _rotate(self) -> None:
        if self._path.exists():
            self._path.replace(self._path.with_name(self._path.name + ".1"))
