"""Attention over a paged KV cache with torch's own operators, on any device.

Decodes: the blocks of several sequences of like length are gathered into one padded tensor, and one
fused call computes all of them, the query heads of a group taken as its rows, so that keys and values
are read once and never repeated. Prompt chunks: one call each. Padding and the window are masked.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from services.worker.engine.attention import Flavour
from services.worker.engine.layout import Flat, Span
from services.worker.engine.memory import Shape


class GatheredCache:
    """Keys and values of every layer, each [blocks, block_tokens, kv_heads, head_dim]."""

    def __init__(
        self, shape: Shape, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        sizes = (blocks, block_tokens, shape.kv_heads, shape.head_dim)
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.keys = [zeros(sizes, dtype, device) for _ in range(shape.layers)]
        self.values = [zeros(sizes, dtype, device) for _ in range(shape.layers)]

    def begin(self, flat: Flat) -> GatheredStep:
        """What the layers of one step call."""
        return GatheredStep(self, torch.from_numpy(flat.slots).to(self.keys[0].device), flat.spans)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores [tokens, kv_heads, head_dim] at `slots` (block · block_tokens + offset)."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store.flatten(0, 1).index_copy_(0, slots, new)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [n, m] blocks, each [n, kv_heads, m · block_tokens, head_dim]."""
        return self._gather(self.keys[layer], blocks), self._gather(self.values[layer], blocks)

    @staticmethod
    def _gather(store: Tensor, blocks: Tensor) -> Tensor:
        rows = store.flatten(1).index_select(0, blocks.flatten())
        return rows.view(blocks.shape[0], -1, *store.shape[2:]).transpose(1, 2)


def zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU memory of its own that is taken from the system only where it is written."""
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(sizes) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(sizes)


@dataclass(frozen=True, slots=True)
class View:
    """What a span's queries may see: [n, m] blocks and an additive mask over their tokens."""

    blocks: Tensor
    mask: Tensor


class GatheredStep:
    """One step's tokens, as every layer needs them."""

    def __init__(self, cache: GatheredCache, slots: Tensor, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.slots = slots
        self.spans = spans
        self._views: dict[tuple[int, int], View] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour) -> Tensor:
        """[heads, tokens, dim] and twice [kv_heads, tokens, dim] to [tokens, heads, dim]."""
        self.cache.write(layer, self.slots, key.transpose(0, 1), value.transpose(0, 1))
        parts = [self._span(number, layer, query, key, value, flavour) for number in range(len(self.spans))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _span(
        self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour
    ) -> Tensor:
        span = self.spans[number]
        count, width = span.positions.shape
        kv_heads, _, dim = key.shape
        queries = query[:, span.rows].view(kv_heads, -1, count * width, dim)
        if span.fresh and (not flavour.window or width <= flavour.window):
            keys, values, mask = key[None, :, span.rows], value[None, :, span.rows], None
        else:
            view = self._view(number, flavour.window)
            keys, values = self.cache.read(layer, view.blocks)
            mask = view.mask
        if width == 1:
            return _fused(queries.permute(2, 0, 1, 3), keys, values, mask, flavour).flatten(1, 2)
        spread = (-1, queries.shape[1], -1, -1)
        keys, values = keys.transpose(0, 1).expand(spread), values.transpose(0, 1).expand(spread)
        return _fused(queries, keys, values, mask, flavour).flatten(0, 1).transpose(0, 1)

    def _view(self, number: int, window: int) -> View:
        view = self._views.get((number, window))
        if view is None:
            view = self._views[number, window] = self._make_view(self.spans[number], window)
        return view

    def _make_view(self, span: Span, window: int) -> View:
        """The blocks from the first that any query of a row can see, and what each query sees of them.

        A row that needs fewer blocks than the widest reads its own last one again, masked.
        """
        size, positions = self.cache.block_tokens, span.positions
        last = positions[:, -1:] // size
        first = np.maximum(positions[:, :1] - window + 1, 0) // size if window else np.zeros_like(last)
        columns = first + np.arange(int((last - first).max()) + 1)
        blocks = np.take_along_axis(span.table, np.minimum(columns, last), axis=1)
        tokens = (columns[:, :, None] * size + np.arange(size)).reshape(len(columns), 1, -1)
        hidden = tokens > positions[:, :, None]
        if window:
            hidden |= tokens <= positions[:, :, None] - window
        device = self.slots.device
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=device)
        mask.masked_fill_(torch.from_numpy(hidden).to(device), float("-inf"))
        return View(torch.from_numpy(blocks).to(device), mask.unsqueeze(1))


def _fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, flavour: Flavour) -> Tensor:
    """[n, heads, rows, dim] over [n, heads, tokens, dim]; without a mask it is causal."""
    scale, softcap = flavour.scale, flavour.softcap
    if not softcap:
        return functional.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=mask is None, scale=scale
        )
    scores = torch.tanh(torch.matmul(query, keys.transpose(-1, -2)) * (scale / softcap)) * softcap
    if mask is None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    else:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)
