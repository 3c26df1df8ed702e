"""One request is one trace: a server span with the field's names, and its children."""

from __future__ import annotations

import pytest
from loom.inference.v1 import inference_pb2 as pb
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.integration.gateway.conftest import SCRIPT
from tests.integration.gateway.fakes import breaks_after
from tokenloom.kit import telemetry
from tokenloom.kit.errors import CallError

CHAT = [{"role": "user", "content": "?"}]
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def exported(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def tree(exporter):
    """(caller, callee) by name for all spans of the trace."""
    spans = [s for s in exporter.get_finished_spans() if f"{s.context.trace_id:032x}" == TRACE_ID]
    names = {span.context.span_id: span.name for span in spans}
    return {(names.get(s.parent.span_id, "caller") if s.parent else None, s.name) for s in spans}, {
        span.name: span for span in spans
    }


CLIENT = "loom.worker.v1.WorkerService/Generate"


def expected(server):
    return {
        ("caller", server),
        (server, "admission"),
        (server, "tokenise"),
        (server, CLIENT),
        (server, "detokenise"),
    }


async def test_a_chat_over_http_is_one_trace(house, exported):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": len(SCRIPT),
        "seed": 3,
    }
    async with house.http.post(
        "/v1/chat/completions", json=body | {"stop": ["zzz"]}, headers={"traceparent": PARENT}
    ) as response:
        assert response.status == 200
        await response.read()
    edges, spans = tree(exported)
    assert edges >= expected("chat tiny")
    server = spans["chat tiny"]
    facts = dict(server.attributes)
    assert server.kind is trace.SpanKind.SERVER
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.request.model"] == "tiny"
    assert facts["gen_ai.request.max_tokens"] == len(SCRIPT)
    assert facts["gen_ai.request.seed"] == "3"
    assert facts["gen_ai.request.stop_sequences"] == ("zzz",)
    assert facts["gen_ai.response.model"].startswith("tiny@sha256:")
    assert facts["gen_ai.response.finish_reasons"] == ("length",)
    assert facts["gen_ai.usage.output_tokens"] == len(SCRIPT)
    assert facts["gen_ai.usage.cache_read.input_tokens"] == 1
    assert facts["gen_ai.response.time_to_first_chunk"] > 0
    assert spans[CLIENT].kind is trace.SpanKind.CLIENT
    assert spans[CLIENT].attributes["tokenloom.worker"] == "worker-0"


async def test_a_completion_over_grpc_is_one_trace_and_the_worker_continues_it(house, exported):
    request = pb.GenerateRequest(model="tiny", prompt="x")
    request.stop.max_new_tokens = 3
    async for _ in house.stub.Generate(request, metadata=[("traceparent", PARENT)]):
        pass
    edges, spans = tree(exported)
    assert edges >= expected("text_completion tiny")
    sent = house.worker.metadata[0]["traceparent"]
    assert sent == f"00-{TRACE_ID}-{spans[CLIENT].context.span_id:016x}-01"


async def test_each_attempt_is_a_span_of_its_own_and_a_failed_one_says_why(house, exported):
    house.worker.attempts = [breaks_after(2, CallError("ENGINE_RESTARTED", "it restarted"))]
    request = pb.GenerateRequest(model="tiny", prompt="x")
    request.stop.max_new_tokens = 4
    async for _ in house.stub.Generate(request, metadata=[("traceparent", PARENT)]):
        pass
    clients = [
        s for s in exported.get_finished_spans() if s.name == CLIENT and s.kind is trace.SpanKind.CLIENT
    ]
    assert [s.attributes["tokenloom.attempt"] for s in clients] == [1, 2]
    assert [s.attributes["tokenloom.resumed_tokens"] for s in clients] == [0, 2]
    assert clients[0].attributes["error.type"] == "ENGINE_RESTARTED"
    assert clients[1].status.is_ok or clients[1].status.status_code is trace.StatusCode.UNSET


async def test_a_refused_request_is_an_error_in_its_trace(house, exported):
    async with house.http.post(
        "/v1/completions", json={"model": "nope", "prompt": "x"}, headers={"traceparent": PARENT}
    ) as response:
        assert response.status == 404
    _, spans = tree(exported)
    server = spans["text_completion nope"]
    assert server.status.status_code is trace.StatusCode.ERROR
    assert server.attributes["error.type"] == "MODEL_NOT_FOUND"
    assert server.attributes["http.response.status_code"] == 404
