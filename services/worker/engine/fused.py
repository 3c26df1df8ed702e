"""Decoder layers of the plain shape, with fewer and larger operations than transformers' own.

Plain means: RMS norm, attention with rotary positions, residual, RMS norm, gated MLP, residual; query and
key may have norms of their own. Families not named here keep transformers' layers. The sums are the same,
only their order within rounding is not; the exactness tests hold both kinds to the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from services.worker.engine.attention import Flavour, StepContext
from services.worker.engine.linear import Product, Products

WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
"""The plain layers, and where each keeps its attention window."""


def fuse(model: nn.Module, products: Products) -> int:
    """Replaces the plain layers of a model in place; how many."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in WINDOWS and (layer := _fused(child, products)) is not None:
                setattr(parent, name, layer)
                replaced += 1
    return replaced


def _fused(layer: Any, products: Products) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = products.joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = products.joined([mlp.gate_proj, mlp.up_proj])
    if qkv is None or gate_up is None:
        return None
    o, down = products.of(attention.o_proj), products.of(mlp.down_proj)
    return Layer(layer, WINDOWS[type(layer).__name__](attention) or 0, qkv, o, gate_up, down)


class Layer(nn.Module):
    """Stands where one of transformers' decoder layers was, and is called as that was."""

    def __init__(
        self, layer: Any, window: int, qkv: Product, o: Product, gate_up: Product, down: Product
    ) -> None:
        super().__init__()
        attention = layer.self_attn
        self._index: int = attention.layer_idx
        self._flavour = Flavour(attention.scaling, window)
        self._dim: int = attention.head_dim
        self._heads: int = attention.q_proj.out_features // self._dim
        self._rotated: int = self._heads + attention.k_proj.out_features // self._dim
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._before, self._after = layer.input_layernorm, layer.post_attention_layernorm
        self._q_norm, self._k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._act: Callable[[Tensor], Tensor] = layer.mlp.act_fn
        self._inner: int = layer.mlp.gate_proj.out_features

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        step: StepContext,
        **others: object,
    ) -> Tensor:
        """[1, tokens, width] to the same."""
        x = hidden_states[0]
        heads = self._qkv(_norm(self._before, x)).view(x.shape[0], -1, self._dim)
        query_key, value = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._q_norm is not None and self._k_norm is not None:
            query, key = query_key[:, : self._heads], query_key[:, self._heads :]
            query_key = torch.cat([_norm(self._q_norm, query), _norm(self._k_norm, key)], 1)
        query_key = _rotate(query_key, *position_embeddings, step)
        query, key = query_key[:, : self._heads], query_key[:, self._heads :]
        mixed = step.attend(
            self._index, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._flavour
        )
        x = self._o(mixed.flatten(1)).add_(x)
        gate_up = self._gate_up(_norm(self._after, x))
        inner = self._act(gate_up[:, : self._inner]).mul_(gate_up[:, self._inner :])
        return self._down(inner).add_(x).unsqueeze(0)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, step: StepContext) -> Tensor:
    """Rotary positions for [tokens, heads, dim]; the halves of a head are each other's partners."""
    half = x.shape[-1] // 2
    if step.rotation is None or step.rotation[0] is not cos:
        signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        step.rotation = (cos, cos[0].unsqueeze(1), signed[0].unsqueeze(1))
    _, factor, signed = step.rotation
    return torch.addcmul(x * factor, torch.cat([x[..., half:], x[..., :half]], -1), signed)
