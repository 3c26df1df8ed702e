"""Decoder layers of the plain shape, with fewer and larger operations than transformers' own.

Plain means: RMS norm, attention with rotary positions, residual, RMS norm, gated MLP, residual; query and
key may have norms of their own. Families not named here keep transformers' layers. The sums are the same,
only their order within rounding is not; the exactness tests hold both kinds to the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from services.worker.engine.attention import Flavour, Step
from services.worker.engine.cpu.kernels import Kernels
from services.worker.engine.cpu.stack import Common, KernelProduct, LayerParts, Stack
from services.worker.engine.linear import Product, Products
from services.worker.engine.operations import Heads, KernelOperations, Operations, TorchOperations, Turn

WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
"""The plain layers, and where each keeps its attention window."""

GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""`hidden_act` of a configuration, and what the kernels call it."""


def fuse(model: nn.Module, products: Products) -> int:
    """Replaces the plain layers of a model in place; how many."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in WINDOWS and (layer := _fused(child, products)) is not None:
                setattr(parent, name, layer)
                replaced += 1
    if replaced and products.on_triton:
        _finish(model)
    return replaced


def _finish(model: nn.Module) -> None:
    """The norm behind the plain layers, in one kernel too."""
    from services.worker.engine.cuda.operations import OuterNorm

    for parent in list(model.modules()):
        layers, norm = getattr(parent, "layers", None), getattr(parent, "norm", None)
        if isinstance(layers, nn.ModuleList) and norm is not None and hasattr(norm, "variance_epsilon"):
            parent.norm = OuterNorm(norm)


def stack(model: nn.Module, kernels: Kernels) -> int:
    """Replaces the lists of layers that the kernels compute from end to end by one module each; how many.

    After the weights of the norms have the activations' dtype.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ModuleList) and (one := _stacked(child, kernels)) is not None:
                setattr(parent, name, nn.ModuleList([one]))
                replaced += 1
    return replaced


def _stacked(layers: nn.ModuleList, kernels: Kernels) -> Stack | None:
    plain = [layer for layer in layers if isinstance(layer, Layer)]
    parts = [part for layer in plain if (part := layer.parts()) is not None]
    common = {layer.common() for layer in plain}
    if not parts or len(parts) < len(layers) or len(common) > 1:
        return None
    return Stack(kernels, common.pop(), parts)


def _fused(layer: Any, products: Products) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = products.joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = products.joined([mlp.gate_proj, mlp.up_proj])
    if qkv is None or gate_up is None:
        return None
    o, down = products.of(attention.o_proj), products.of(mlp.down_proj)
    return Layer(layer, _heads(layer), _operations(layer, products), qkv, o, gate_up, down)


def _heads(layer: Any) -> Heads:
    attention = layer.self_attn
    count = attention.q_proj.out_features // attention.head_dim
    return Heads(
        layer=attention.layer_idx,
        count=count,
        rotated=count + attention.k_proj.out_features // attention.head_dim,
        dim=attention.head_dim,
        flavour=Flavour(attention.scaling, WINDOWS[type(layer).__name__](attention) or 0),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
    )


def _operations(layer: Any, products: Products) -> Operations:
    gate = GATES.get(layer.self_attn.config.hidden_act)
    if products.kernels is not None and gate is not None:
        return KernelOperations(products.kernels, gate)
    if products.on_triton and gate is not None:
        from services.worker.engine.cuda.operations import CudaOperations

        return CudaOperations(gate)
    return TorchOperations(layer.mlp.act_fn)


class Layer(nn.Module):
    """Stands where one of transformers' decoder layers was, and is called as that was."""

    def __init__(
        self, layer: Any, heads: Heads, operations: Operations,
        qkv: Product, o: Product, gate_up: Product, down: Product,
    ) -> None:  # fmt: skip
        super().__init__()
        self._heads, self._operations = heads, operations
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._before, self._after = layer.input_layernorm, layer.post_attention_layernorm

    def common(self) -> Common:
        """What a stack's layers must share."""
        heads, gate = self._heads, getattr(self._operations, "gate_name", "")
        return Common(heads.count, heads.dim, heads.flavour.scale, self._before.variance_epsilon, gate)

    def parts(self) -> LayerParts | None:
        """The layer for a stack; None when a part of it is not the kernels' own."""
        qkv, o, gate_up, down = self._qkv, self._o, self._gate_up, self._down
        if not (
            isinstance(self._operations, KernelOperations)
            and isinstance(qkv, KernelProduct)
            and isinstance(o, KernelProduct)
            and isinstance(gate_up, KernelProduct)
            and isinstance(down, KernelProduct)
            and not self._heads.flavour.softcap
            and self._before.variance_epsilon == self._after.variance_epsilon
        ):
            return None
        return LayerParts(
            index=self._heads.layer,
            before=self._before.weight,
            qkv=qkv,
            norms=self._heads.norms(),
            o=o,
            after=self._after.weight,
            gate_up=gate_up,
            down=down,
            window=self._heads.flavour.window,
        )

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: Turn, step: Step, **others: object
    ) -> Tensor:
        """[1, tokens, width] to the same."""
        x, operations = hidden_states[0], self._operations
        qkv = self._qkv(operations.norm(self._before, x))
        x = self._o(operations.mix(self._heads, qkv, position_embeddings, step), x)
        inner = operations.gate(self._gate_up(operations.norm(self._after, x)))
        return self._down(inner, x).unsqueeze(0)
