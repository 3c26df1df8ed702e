"""A worker's load report, from the wire into the core's words.

Some thousands come in a second: what is told only when it changed costs one look where it is missing.
"""

from __future__ import annotations

from loom.worker.v1 import worker_pb2

from services.batcher.core.messages import (
    LoadReport,
    ModelNews,
    ModelReport,
    ModelState,
    PrefixChanges,
    Served,
)

_STATES = {
    worker_pb2.MODEL_STATE_FETCHING: ModelState.FETCHING,
    worker_pb2.MODEL_STATE_LOADING: ModelState.LOADING,
    worker_pb2.MODEL_STATE_READY: ModelState.READY,
    worker_pb2.MODEL_STATE_DRAINING: ModelState.DRAINING,
    worker_pb2.MODEL_STATE_FAILED: ModelState.FAILED,
}


def load_report(report: worker_pb2.LoadReport) -> LoadReport:
    """Models in a state that is not known here are left out."""
    models: list[ModelReport] = []
    news: list[ModelNews] = []
    for model in report.models:
        state = _STATES.get(model.state)
        if state is None:
            continue
        models.append(_model(model, state))
        if model.HasField("prefix") or model.served:
            news.append(_news(model))
    return LoadReport(
        report.boot_id,
        report.draining,
        tuple(models),
        tuple(report.active_request_ids),
        tuple(news),
        report.memory_budget_bytes,
        report.free_memory_bytes,
        report.loads_on_demand,
    )


def _model(model: worker_pb2.ResidentModel, state: ModelState) -> ModelReport:
    # By position: names would cost a third more.
    return ModelReport(
        model.version,
        state,
        model.progress,
        model.error,
        model.free_sequences,
        model.free_blocks,
        model.block_tokens,
        model.total_blocks,
        model.running,
        model.waiting,
        model.queued_prefill_tokens,
        model.prefill_tokens_per_s,
        model.sequences_max,
        model.decode_tokens_per_s,
        model.step_tokens_max,
        model.prefix_queried_tokens,
        model.prefix_hit_tokens,
        model.memory_bytes,
        model.dwell_left_ms / 1000,
        model.idle_ms / 1000,
    )


def _news(model: worker_pb2.ResidentModel) -> ModelNews:
    changes = None
    if model.HasField("prefix"):
        told = model.prefix
        changes = PrefixChanges(told.whole, tuple(told.stored), tuple(told.evicted))
    served = tuple(
        Served(one.tenant, one.priority, one.prompt_tokens, one.generated_tokens) for one in model.served
    )
    return ModelNews(model.version, changes, served)
