"""Trace context through metadata, and spans that end up where they belong."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tokenloom.kit import telemetry


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return exporter


def test_context_survives_metadata(spans):
    with telemetry.span("caller") as caller:
        metadata = dict(telemetry.inject())
    context = telemetry.extract(metadata)
    with telemetry.span("callee", context=context):
        assert telemetry.trace_id_of() == f"{caller.get_span_context().trace_id:032x}"
    (callee,) = (s for s in spans.get_finished_spans() if s.name == "callee")
    assert callee.parent.span_id == caller.get_span_context().span_id


def test_metadata_without_context_starts_a_trace_of_its_own(spans):
    with telemetry.span("outer"), telemetry.span("inner", context=telemetry.extract({"x": "y"})):
        pass
    (inner,) = (s for s in spans.get_finished_spans() if s.name == "inner")
    assert inner.parent is None


def test_recorded_spans_keep_their_times_and_never_run_backwards(spans):
    context = trace.set_span_in_context(trace.INVALID_SPAN)
    telemetry.record("good", 10, 20, context, {"a": 1})
    telemetry.record("skewed", 20, 10, context, error="lost")
    good, skewed = spans.get_finished_spans()
    assert (good.start_time, good.end_time, good.attributes["a"]) == (10, 20, 1)
    assert (skewed.start_time, skewed.end_time) == (20, 20)
    assert skewed.status.status_code is StatusCode.ERROR


def test_an_exception_marks_its_span(spans):
    with pytest.raises(KeyError), telemetry.span("broken"):
        raise KeyError("x")
    (broken,) = spans.get_finished_spans()
    assert broken.status.status_code is StatusCode.ERROR


def test_the_tracer_is_made_once_and_again_for_another_provider(monkeypatch):
    one, two = TracerProvider(), TracerProvider()
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: one)
    first = telemetry.tracer()
    assert telemetry.tracer() is first
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: two)
    assert telemetry.tracer() is not first
