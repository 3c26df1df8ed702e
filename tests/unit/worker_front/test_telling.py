"""What the worker tells the outside: metrics, spans, ORCA, the memory it sees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from services.worker.adapters import spans
from services.worker.adapters.memory import available_bytes
from services.worker.adapters.orca import orca_report
from services.worker.front.ports import ModelVersion
from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from services.worker.front.tally import BOUNDS_S, Tally
from services.worker.metrics import StateCollector, WorkerMetrics
from services.worker.protocol import Output
from tests.unit.worker_front.fakes import READY, FakeLaunch, load, make_engine, make_sequence

SECOND = 1_000_000_000


def resident() -> Resident:
    made = Resident(ModelVersion(f"sha256:{'a' * 64}", "m", 1000, 512), make_engine(FakeLaunch()))
    made.fetching = False
    made.engine._on_event(READY)
    return made


def ended(outcome: str = "stop") -> Sequence:
    """Arrived at 1 s, submitted at 2 s, first token at 4 s, last of three at 8 s."""
    sequence = make_sequence(prompt=7)
    sequence.received_ns, sequence.submitted_ns = SECOND, 2 * SECOND
    sequence.push(Output(sequence.key, [1], 0), 4 * SECOND)
    final = Output(sequence.key, [2, 3], 1, finish=outcome, prefill_ns=2 * SECOND, decode_ns=4 * SECOND)
    sequence.push(final, 8 * SECOND)
    return sequence


async def test_metrics_carry_the_names_of_the_field() -> None:
    registry, model = CollectorRegistry(), resident()
    metrics = WorkerMetrics(registry)
    metrics.watch(StateCollector(lambda: [model], lambda: 2, lambda: False))
    model.engine.admission.offer(make_sequence())
    model.engine.admission.settle(load(running=1, free_blocks=30))
    model.engine.tally.step(5, 4, SECOND)
    hit = make_sequence(prompt=7)
    hit.push(Output(hit.key, [1], 0, cached_prompt_tokens=4), SECOND)
    model.engine.tally.began(hit)
    metrics.ended(ended(), "m", "stop")
    metrics.ended(make_sequence(), "m", "cancelled")
    metrics.refused("WORKER_FULL")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("vllm:num_requests_running", model_name="m") == 1
    assert value("vllm:num_requests_waiting", model_name="m") == 0
    assert value("vllm:kv_cache_usage_perc", model_name="m") == 0.25
    assert value("vllm:cache_config_info", model_name="m", block_size="16", num_gpu_blocks="40") == 1
    assert value("vllm:generation_tokens_total", model_name="m") == 5
    assert value("vllm:prefix_cache_queries_total", model_name="m") == 7
    assert value("vllm:prefix_cache_hits_total", model_name="m") == 4
    assert value("vllm:time_to_first_token_seconds_sum", model_name="m") == 3
    assert value("vllm:e2e_request_latency_seconds_sum", model_name="m") == 7
    assert value("vllm:request_time_per_output_token_seconds_sum", model_name="m") == 2
    assert value("vllm:request_prompt_tokens_sum", model_name="m") == 7
    assert value("vllm:request_success_total", model_name="m", finished_reason="stop") == 1
    assert value("vllm:request_success_total", model_name="m", finished_reason="abort") == 1
    assert value("tokenloom_worker_requests_total", model="m", outcome="cancelled") == 1
    assert value("tokenloom_worker_refused_total", reason="WORKER_FULL") == 1
    assert value("tokenloom_worker_model_state", model="m", state="ready") == 1
    assert value("tokenloom_worker_load_listeners") == 2
    assert b"vllm:inter_token_latency_seconds_bucket" in generate_latest(registry)
    metrics.close()
    assert generate_latest(registry) == b""


def test_gap_between_steps_is_counted_for_each_sequence_that_it_delayed() -> None:
    tally = Tally()
    tally.step(3, 0, SECOND)
    tally.step(3, 3, SECOND + 20_000_000)
    tally.step(2, 2, SECOND + 60_000_000)
    tally.step(2, 2, 500 * SECOND)
    assert tally.generated_tokens == 10
    assert tally.gap_counts[BOUNDS_S.index(0.02)] == 3
    assert tally.gap_counts[BOUNDS_S.index(0.05)] == 2
    assert sum(tally.gap_counts) == 5
    assert tally.gap_sum_s == pytest.approx(3 * 0.02 + 2 * 0.04)


async def test_spans_show_prefill_and_decode_under_the_server_span(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr("tokenloom.kit.telemetry.tracer", lambda: tracer)

    def record(outcome: str, sequence: Sequence) -> dict[str, ReadableSpan]:
        exporter.clear()
        server = tracer.start_span("server")
        call = SimpleNamespace(span=server, context=trace.set_span_in_context(server))
        spans.record_sequence(sequence, resident(), outcome, call)  # type: ignore[arg-type]
        server.end()
        return {span.name: span for span in exporter.get_finished_spans()}

    made = record("stop", ended())
    assert set(made) == {"server", "prefill", "decode"}
    prefill, decode = made["prefill"], made["decode"]
    assert (prefill.start_time, prefill.end_time) == (2 * SECOND, 4 * SECOND)
    assert (decode.start_time, decode.end_time) == (4 * SECOND, 8 * SECOND)
    assert made["server"].attributes is not None
    assert made["server"].attributes["gen_ai.usage.output_tokens"] == 3
    assert made["server"].attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert all(s.parent is not None for s in (prefill, decode))
    assert all(s.parent.span_id == made["server"].context.span_id for s in (prefill, decode) if s.parent)

    never_began = make_sequence()
    never_began.submitted_ns = 2 * SECOND
    lost = record("ENGINE_RESTARTED", never_began)
    assert set(lost) == {"server", "prefill"}
    assert lost["prefill"].status.description == "ENGINE_RESTARTED"
    assert set(record("DRAINING", make_sequence())) == {"server"}


async def test_orca_utilisation_is_that_of_the_fullest_resource() -> None:
    model = resident()
    assert orca_report([model]).application_utilization == 0
    model.engine.admission.offer(make_sequence())
    model.engine.admission.settle(load(running=1, free_blocks=4))
    report = orca_report([model])
    assert report.application_utilization == pytest.approx(0.9)
    assert dict(report.named_metrics) == {"num_requests_running": 1, "num_requests_waiting": 0}


def test_available_memory_is_what_machine_and_container_both_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 10 kB\nMemAvailable:       4 kB\n")
    assert available_bytes(meminfo, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(meminfo, tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 4096
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None


def test_files_in_the_page_cache_are_no_memory_that_a_container_lacks(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 10 kB\nMemAvailable:       8 kB\n")
    (tmp_path / "memory.max").write_text("6000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 700\nfile 4000\ninactive_file 3000\nactive_file 1000\n")
    assert available_bytes(meminfo, tmp_path) == 5000
