"""Traces: W3C context in, spans out over OTLP/gRPC.

Spans on token streams are made by hand (`span`, `record`): the contributed gRPC interceptors cost a
bare relay a fifth of its throughput.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

Attributes = Mapping[str, AttributeValue]

QUEUED_SPANS_MAX = 8192
"""Finished spans that wait for the exporter; more are dropped, never waited for."""

_propagator = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None
_tracer: tuple[trace.TracerProvider, trace.Tracer] | None = None


def setup(
    service: str, instance: str, endpoint: str, *, flush_ms: int = 5000, sample_ratio: float = 1.0
) -> None:
    """Make this process's tracer provider. With an empty `endpoint` spans get ids and go nowhere."""
    global _provider
    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    sampler = ParentBased(TraceIdRatioBased(sample_ratio))
    # `shutdown` below is bounded in time; the one at exit would not be.
    provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
    if endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=5)
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUED_SPANS_MAX,
                schedule_delay_millis=flush_ms,
                max_export_batch_size=512,
            )
        )
    trace.set_tracer_provider(provider)
    _provider = provider


def shutdown(timeout_ms: int = 2000) -> None:
    """Send what is queued, waiting at most `timeout_ms`. Blocks: call it off the event loop."""
    if _provider is not None:
        # The exporter retries a collector that is away for longer than anybody wants to wait here.
        flushing = threading.Thread(target=_provider.shutdown, name="flush spans", daemon=True)
        flushing.start()
        flushing.join(timeout_ms / 1000)


def tracer() -> trace.Tracer:
    """The process's tracer, made once a provider: making one costs as much as a span."""
    global _tracer
    provider = trace.get_tracer_provider()
    if _tracer is None or _tracer[0] is not provider:
        _tracer = provider, provider.get_tracer("tokenloom")
    return _tracer[1]


@contextmanager
def span(
    name: str,
    *,
    context: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
) -> Iterator[Span]:
    """A span that is current inside the block and marked as failed by an exception."""
    with tracer().start_as_current_span(name, context=context, kind=kind, attributes=attributes) as current:
        yield current


def record(
    name: str,
    start_ns: int,
    end_ns: int,
    context: Context,
    attributes: Attributes | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    error: str = "",
) -> None:
    """A span whose times (epoch nanoseconds) are known only afterwards."""
    done = tracer().start_span(name, context=context, kind=kind, attributes=attributes, start_time=start_ns)
    if error:
        done.set_status(Status(StatusCode.ERROR, error))
    done.end(end_time=max(end_ns, start_ns))


def inject(context: Context | None = None) -> list[tuple[str, str]]:
    """`traceparent` (and `tracestate`) for outgoing metadata."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=context)
    return list(carrier.items())


def extract(metadata: Mapping[str, str | bytes]) -> Context:
    """The caller's context, or an empty one."""
    carrier = {k: v for k in ("traceparent", "tracestate") if isinstance(v := metadata.get(k), str)}
    return _propagator.extract(carrier, context=Context())


def trace_id_of(context: Context | None = None) -> str:
    """32 hex digits, or an empty string outside any trace."""
    span_context = trace.get_current_span(context).get_span_context()
    return f"{span_context.trace_id:032x}" if span_context.is_valid else ""
