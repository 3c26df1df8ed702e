"""The paged KV cache that the Triton kernels read and write, and one step's attention over it.

Layout: [blocks, block_tokens, kv_heads, dim] for each layer. A step's decodes are its first rows, one a
sequence; the rest are prompt chunks, cut into tiles. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.attention import Flavour
from services.worker.engine.cuda.decode import decode
from services.worker.engine.cuda.elementwise import place, store
from services.worker.engine.cuda.prefill import prefill
from services.worker.engine.memory import Shape
from services.worker.engine.operations import Heads, Turn


class CudaCache:
    """Keys and values of every layer."""

    def __init__(
        self, shape: Shape, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        sizes = (blocks, block_tokens, shape.kv_heads, shape.head_dim)
        self.kv_heads = shape.kv_heads
        self.keys = [torch.zeros(sizes, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(sizes, dtype=dtype, device=device) for _ in range(shape.layers)]


@dataclass(frozen=True, slots=True)
class Places:
    """Where one step's tokens are, on the device."""

    slots: Tensor
    """[tokens] int64: block · block_tokens + offset; negative: a row of padding."""
    lengths: Tensor
    """[decodes] int32: tokens that each decode sees, its own included; 0: a row of padding."""
    tables: Tensor
    """[chunks, blocks] int32, decodes first."""
    tiles: Tensor | None
    """[tiles, 4] int32 of the prompt chunks; None: there are none."""
    splits: int
    """Programs that share the context of one decode."""


class CudaStep:
    """What the layers of one step call."""

    def __init__(self, cache: CudaCache, places: Places) -> None:
        self._cache = cache
        self._places = places
        self._decodes = places.lengths.shape[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour) -> Tensor:
        """[heads, tokens, dim] and twice [kv_heads, tokens, dim] to [tokens, heads, dim]."""
        store(key, value, self._cache.keys[layer], self._cache.values[layer], self._places.slots)
        return self._attend(layer, query.transpose(0, 1).contiguous(), flavour)

    def attend_joined(self, heads: Heads, qkv: Tensor, turn: Turn) -> Tensor:
        """[tokens, (heads + 2 · kv_heads) · dim], not yet turned, to [tokens, heads, dim]."""
        keys, values = self._cache.keys[heads.layer], self._cache.values[heads.layer]
        query = qkv.new_empty(qkv.shape[0], heads.count, heads.dim)
        place(
            qkv,
            turn[0][0],
            turn[1][0],
            heads.norms(),
            heads.count,
            self._cache.kv_heads,
            keys,
            values,
            self._places.slots,
            query,
        )
        return self._attend(heads.layer, query, heads.flavour)

    def _attend(self, layer: int, query: Tensor, flavour: Flavour) -> Tensor:
        keys, values, places = self._cache.keys[layer], self._cache.values[layer], self._places
        out = torch.empty_like(query)
        if self._decodes:
            decode(
                query[: self._decodes],
                keys,
                values,
                places.tables,
                places.lengths,
                out[: self._decodes],
                flavour,
                splits=places.splits,
            )
        if places.tiles is not None:
            prefill(query, keys, values, places.tables, places.tiles, out, flavour)
        return out
