"""The paged KV cache in the layout of the CPU kernels.

Keys and values are written where they stay and read where they lie; nothing is gathered or copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.worker.engine.attention import Flavour
from services.worker.engine.cpu.kernels import DIM_MAX, SUFFIXES, Kernels, Layer, padded
from services.worker.engine.gathered import zeros
from services.worker.engine.layout import Flat
from services.worker.engine.memory import Shape

Norms = tuple[Tensor, Tensor, float]
"""Weights of the norms of query and key, and their epsilon."""


def suits(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether the kernels know such a model."""
    return dtype in SUFFIXES and shape.head_dim <= DIM_MAX


class KernelCache:
    """Keys and values of every layer."""

    def __init__(self, kernels: Kernels, shape: Shape, blocks: int, block_tokens: int, dtype: torch.dtype):
        cpu = torch.device("cpu")
        keys = (blocks, shape.kv_heads, shape.head_dim, padded(block_tokens))
        values = (blocks, shape.kv_heads, block_tokens, padded(shape.head_dim))
        self.kernels = kernels
        self.layers = [
            Layer(zeros(keys, dtype, cpu), zeros(values, dtype, cpu), block_tokens, shape.head_dim)
            for _ in range(shape.layers)
        ]

    def begin(self, flat: Flat) -> KernelStep:
        """What the layers of one step call."""
        return KernelStep(self, flat)


class KernelStep:
    """One step's tokens."""

    def __init__(self, cache: KernelCache, flat: Flat) -> None:
        self._kernels = cache.kernels
        self.cache = cache
        self.slots = torch.from_numpy(flat.slots)
        self.chunks = torch.from_numpy(flat.chunks)
        self.tables = torch.from_numpy(flat.tables)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour) -> Tensor:
        """[heads, tokens, dim] and twice [kv_heads, tokens, dim] to [tokens, heads, dim]."""
        self._kernels.store(key.transpose(0, 1), value.transpose(0, 1), self.slots, self.cache.layers[layer])
        return self._mix(layer, query.transpose(0, 1), flavour)

    def attend_joined(
        self, layer: int, qkv: Tensor, heads: int, turn: tuple[Tensor, Tensor], norms: Norms | None,
        flavour: Flavour,
    ) -> Tensor:  # fmt: skip
        """[tokens, heads + 2 · kv_heads, dim] as one product gave it, to [tokens, heads, dim].

        `turn`: cosines and sines [1, tokens, rotated part of a head].
        """
        cosines, sines = turn
        self._kernels.place(qkv, cosines, sines, norms, self.slots, heads, self.cache.layers[layer])
        return self._mix(layer, qkv[:, :heads], flavour)

    def _mix(self, layer: int, query: Tensor, flavour: Flavour) -> Tensor:
        return self._kernels.attend(
            query, self.tables, self.chunks, self.cache.layers[layer],
            scale=flavour.scale, window=flavour.window, softcap=flavour.softcap,
        )  # fmt: skip
