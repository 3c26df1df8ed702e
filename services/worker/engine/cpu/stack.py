"""All plain decoder layers of a model as one call of the CPU kernels, with Python's lock free meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.worker.engine.cpu.cache import KernelStep, Norms
from services.worker.engine.cpu.kernels import GATES, Kernels, Panels

_LONG, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Weight(ctypes.Structure):
    _fields_ = (
        ("words", _POINTER), ("bias", _POINTER),
        ("narrow", _LONG), ("outputs", _LONG), ("inputs", _LONG),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("before", _POINTER), ("qkv", _Weight), ("query_norm", _POINTER), ("key_norm", _POINTER),
        ("o", _Weight), ("after", _POINTER), ("gate_up", _Weight), ("down", _Weight),
        ("keys", _POINTER), ("values", _POINTER), ("window", _LONG),
    )  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = (
        ("layers", _LONG), ("heads", _LONG), ("kv_heads", _LONG), ("dim", _LONG),
        ("block_tokens", _LONG), ("gate", _LONG),
        ("norm_eps", _FLOAT), ("head_norm_eps", _FLOAT), ("scale", _FLOAT),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", _LONG), ("cosines", _POINTER), ("sines", _POINTER), ("turned", _LONG),
        ("slots", _POINTER), ("tables", _POINTER), ("table_stride", _LONG),
        ("chunks", _POINTER), ("chunk_count", _LONG),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelProduct:
    """A linear layer of the kernels: `x [..., inputs]` to `[..., outputs]`, or added onto that much."""

    kernels: Kernels
    weight: Panels
    bias: Tensor | None

    def __call__(self, x: Tensor, onto: Tensor | None = None, /) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias, onto)

    def as_argument(self) -> _Weight:
        bias = None if self.bias is None else self.bias.data_ptr()
        weight = self.weight
        return _Weight(weight.words.data_ptr(), bias, int(weight.narrow), weight.outputs, weight.inputs)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one plain layer is made of, in float32."""

    index: int
    before: Tensor
    qkv: KernelProduct
    norms: Norms | None
    o: KernelProduct
    after: Tensor
    gate_up: KernelProduct
    down: KernelProduct
    window: int


@dataclass(frozen=True, slots=True)
class Common:
    """What all layers of a stack share."""

    heads: int
    dim: int
    scale: float
    norm_eps: float
    gate: str


class Stack(nn.Module):
    """Stands where transformers' decoder layers were, all of them, and is called as one of them was."""

    def __init__(self, kernels: Kernels, common: Common, layers: Sequence[LayerParts]) -> None:
        super().__init__()
        self._kernels = kernels
        self._common = common
        self._parts = list(layers)
        self._cache: object = None
        self._shape = _Shape()
        self._arguments = (_Layer * len(layers))()
        first = layers[0]
        self._token_floats = (
            first.qkv.weight.inputs
            + first.qkv.weight.outputs
            + first.o.weight.inputs
            + 3 * first.down.weight.inputs
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        step: KernelStep,
        **others: object,
    ) -> Tensor:
        """[1, tokens, width] to the same, in place."""
        if step.cache is not self._cache:
            self._bind(step)
        x = hidden_states[0].contiguous()
        cosines, sines = (part[0].contiguous() for part in position_embeddings)
        space = torch.empty(x.shape[0] * self._token_floats)
        arguments = _Step(
            x.shape[0], cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1],
            step.slots.data_ptr(), step.tables.data_ptr(), step.tables.stride(0),
            step.chunks.data_ptr(), step.chunks.shape[0],
        )  # fmt: skip
        self._kernels.stack(self._shape, self._arguments, arguments, x, space)
        return x.unsqueeze(0)

    def _bind(self, step: KernelStep) -> None:
        """Notes where this cache's memory is."""
        self._cache = step.cache
        cached = [step.cache.layers[part.index] for part in self._parts]
        common = self._common
        eps = next((part.norms[2] for part in self._parts if part.norms is not None), 0.0)
        self._shape = _Shape(
            len(self._parts), common.heads, cached[0].kv_heads, common.dim, cached[0].block_tokens,
            GATES[common.gate], common.norm_eps, eps, common.scale,
        )  # fmt: skip
        for number, (part, layer) in enumerate(zip(self._parts, cached, strict=True)):
            query_norm, key_norm = (None, None) if part.norms is None else part.norms[:2]
            self._arguments[number] = _Layer(
                part.before.data_ptr(), part.qkv.as_argument(),
                None if query_norm is None else query_norm.data_ptr(),
                None if key_norm is None else key_norm.data_ptr(),
                part.o.as_argument(), part.after.data_ptr(),
                part.gate_up.as_argument(), part.down.as_argument(),
                layer.keys.data_ptr(), layer.values.data_ptr(), part.window,
            )  # fmt: skip
