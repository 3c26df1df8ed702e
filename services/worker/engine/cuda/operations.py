"""What a plain decoder layer does between its products, with the Triton kernels."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from services.worker.engine.attention import Step
from services.worker.engine.cuda import elementwise
from services.worker.engine.cuda.cache import CudaStep
from services.worker.engine.operations import Heads, Turn


class CudaOperations:
    """On a CUDA device, `gate` being a name that the kernels know."""

    def __init__(self, gate: str) -> None:
        self._gate = gate

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        return elementwise.norm(x, norm.weight, norm.variance_epsilon)

    def gate(self, both: Tensor) -> Tensor:
        return elementwise.gate(both, self._gate)

    def mix(self, heads: Heads, qkv: Tensor, turn: Turn, step: Step) -> Tensor:
        # A model that was arranged for the kernels has the kernels' cache.
        return cast(CudaStep, step).attend_joined(heads, qkv, turn).flatten(1)


class OuterNorm(nn.Module):
    """The norm after the last layer, as one kernel."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, width] to the same."""
        return elementwise.norm(x[0], self._norm.weight, self._norm.variance_epsilon).unsqueeze(0)
