"""Attention over a paged KV cache, for a batch flattened to [1, tokens].

transformers calls `attend` through its AttentionInterface, once a layer; `StepContext` says which of the
tokens belong together. No mask function is registered beside it, so transformers makes no masks.

Decodes: the blocks of several sequences of like length are gathered into one padded tensor, and one
fused call computes all of them, the query heads of a group taken as its rows, so that keys and values
are read once and never repeated. Prompt chunks: one call each. Padding and the window are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "tokenloom"
PADDING_BLOCKS_MAX = 32
"""Blocks of padding that a group of decodes may hold before a further group is cheaper."""

KNOWN_ARGUMENTS = frozenset({"dropout", "position_ids", "use_cache", "output_attentions", "is_causal"})
"""Arguments of an attention call that change nothing here."""


class UnknownArgument(Exception):
    """A model asks its attention for something that is not implemented."""


class KvCache:
    """Keys and values of every layer, each [blocks, block_tokens, kv_heads, head_dim]."""

    def __init__(
        self, *, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (blocks, block_tokens, kv_heads, head_dim)
        self.block_tokens = block_tokens
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

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


@dataclass(slots=True)
class View:
    """What a group of queries may see: [n, m] blocks and an additive mask over their tokens."""

    blocks: Tensor
    mask: Tensor


@dataclass(slots=True)
class Group:
    """Queries of one shape: `rows` of the batch are n sequences with `width` tokens each.

    `positions` [n, width] are the queries' own, `table` [n, blocks] numbers the sequences' blocks.
    A chunk that begins its sequence (`fresh`) sees only itself and reads nothing from the cache.
    """

    rows: slice
    positions: NDArray[np.int64]
    table: NDArray[np.int64]
    fresh: bool = False
    views: dict[int, View] = field(default_factory=dict)


class StepContext:
    """One step's tokens, as every layer needs them."""

    def __init__(
        self, cache: KvCache, slots: Tensor, groups: Sequence[Group], *, dtype: torch.dtype
    ) -> None:
        self.cache = cache
        self.slots = slots
        self.groups = groups
        self._dtype = dtype

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        """[heads, tokens, dim] and twice [kv_heads, tokens, dim] to [tokens, heads, dim].

        `window` 0: unlimited; `softcap` 0: none.
        """
        self.cache.write(layer, self.slots, key.transpose(0, 1), value.transpose(0, 1))
        parts = [self._group(group, layer, query, key, value, scale, window, softcap) for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _group(
        self, group: Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        count, width = group.positions.shape
        heads, _, dim = query.shape
        kv_heads = key.shape[0]
        queries = query[:, group.rows].view(kv_heads, -1, count, width, dim).permute(2, 0, 1, 3, 4)
        mask: Tensor | None = None
        if group.fresh and (not window or width <= window):
            keys, values = key[None, :, group.rows], value[None, :, group.rows]
        else:
            view = self._view(group, window)
            keys, values = self.cache.read(layer, view.blocks)
            mask = view.mask
        if width == 1:
            merged = _fused(queries.reshape(count, kv_heads, -1, dim), keys, values, mask, scale, softcap)
            return merged.reshape(count, heads, dim)
        grouped = [keys.unsqueeze(2), values.unsqueeze(2)]
        keys, values = (part.expand(-1, -1, queries.shape[2], -1, -1).flatten(0, 1) for part in grouped)
        merged = _fused(queries.flatten(0, 1), keys, values, mask, scale, softcap)
        return merged.view(count, heads, width, dim).transpose(1, 2).reshape(count * width, heads, dim)

    def _view(self, group: Group, window: int) -> View:
        if window not in group.views:
            group.views[window] = self._make_view(group, window)
        return group.views[window]

    def _make_view(self, group: Group, window: int) -> View:
        """The blocks from the first that any query of a row can see, and what each query sees of them."""
        size, positions = self.cache.block_tokens, group.positions
        first = np.maximum(positions[:, :1] - window + 1, 0) // size if window else 0 * positions[:, :1]
        columns = first + np.arange(int((positions[:, -1:] // size - first).max()) + 1)
        blocks = np.take_along_axis(group.table, np.minimum(columns, group.table.shape[1] - 1), axis=1)
        tokens = (columns[:, :, None] * size + np.arange(size)).reshape(len(columns), 1, -1)
        hidden = tokens > positions[:, :, None]
        if window:
            hidden |= tokens <= positions[:, :, None] - window
        device = self.slots.device
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=device)
        mask.masked_fill_(torch.from_numpy(hidden).to(device), float("-inf"))
        return View(torch.from_numpy(blocks).to(device), mask.unsqueeze(1))


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[n, heads, rows, dim] over [n, heads, tokens, dim]; without a mask it is causal."""
    if not softcap:
        causal = mask is None
        return functional.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=scale)
    scores = torch.tanh(torch.matmul(query, keys.transpose(-1, -2)) * (scale / softcap)) * softcap
    if mask is None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    else:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)


def group_decodes(lengths: Sequence[int], block_tokens: int) -> list[slice]:
    """Cuts decodes, sorted by falling length, into groups whose padding is bounded.

    A group's padding is at most PADDING_BLOCKS_MAX blocks, or a quarter of what it really reads.
    """
    cuts, widest, used, padding = [0], 0, 0, 0
    for number, length in enumerate(lengths):
        blocks = -(-length // block_tokens)
        waste = padding + max(0, widest - blocks)
        if number == 0 or waste > max(PADDING_BLOCKS_MAX, used // 4):
            cuts += [number] if number else []
            widest, used, waste = blocks, 0, 0
        used, padding = used + blocks, waste
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    step: StepContext | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention call: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    unknown = [name for name, value in others.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if unknown or step is None or attention_mask is not None:
        raise UnknownArgument(f"attention arguments {', '.join(unknown) or 'without a step'} are not known")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = step.attend(layer, query[0], key[0], value[0], scale, sliding_window or 0, softcap or 0.0)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes IMPLEMENTATION known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attend)
