"""Which runner a model gets."""

from __future__ import annotations

from services.worker.core.plan import Limits
from services.worker.engine.loader import LoadedModel
from services.worker.engine.runner import Runner, StepRunner


def make_runner(loaded: LoadedModel, limits: Limits) -> StepRunner:
    """The device's own where the model was arranged for it, otherwise the one for every device."""
    if loaded.on_triton:
        from services.worker.engine.cuda.runner import CudaRunner

        return CudaRunner(loaded, limits)
    return Runner(loaded, limits)
