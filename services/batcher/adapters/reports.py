"""A worker's load report, from the wire into the core's words."""

from __future__ import annotations

from loom.worker.v1 import worker_pb2

from services.batcher.core.messages import LoadReport, ModelReport, ModelState

_STATES = {
    worker_pb2.MODEL_STATE_FETCHING: ModelState.FETCHING,
    worker_pb2.MODEL_STATE_LOADING: ModelState.LOADING,
    worker_pb2.MODEL_STATE_READY: ModelState.READY,
    worker_pb2.MODEL_STATE_DRAINING: ModelState.DRAINING,
    worker_pb2.MODEL_STATE_FAILED: ModelState.FAILED,
}


def load_report(report: worker_pb2.LoadReport) -> LoadReport:
    """Models in a state that is not known here are left out."""
    return LoadReport(
        boot_id=report.boot_id,
        draining=report.draining,
        models=tuple(_model(model) for model in report.models if model.state in _STATES),
        active_request_ids=tuple(report.active_request_ids),
    )


def _model(model: worker_pb2.ResidentModel) -> ModelReport:
    return ModelReport(
        version=model.version,
        state=_STATES[model.state],
        progress=model.progress,
        error=model.error,
        free_sequences=model.free_sequences,
        free_blocks=model.free_blocks,
        block_tokens=model.block_tokens,
        total_blocks=model.total_blocks,
        running=model.running,
        waiting=model.waiting,
        queued_prefill_tokens=model.queued_prefill_tokens,
        prefill_tokens_per_s=model.prefill_tokens_per_s,
        sequences_max=model.sequences_max,
    )
