"""Attention of one new token of each of n sequences over the paged cache.

A program takes one key head of one sequence, with all the query heads that share it as the rows of its
products, so that every key and value is read once; where sequences are few, `splits` programs share a
sequence's context, and a second kernel combines what they found. All that changes from step to step is
read from tensors: a captured call is replayed with other lengths and other tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.engine.cuda.softmax import (
    LOWEST,
    UNLIMITED,
    WIDTH_MIN,
    absorb,
    bend,
    find_blocks,
    width_of,
)

if TYPE_CHECKING:
    from services.worker.engine.attention import Flavour

SPLITS_MAX = 32
"""More make the combining dearer than what they gain."""
PROGRAMS_PER_MULTIPROCESSOR = 1
"""One with several tiles on their way keeps the memory system as busy as two do, without combining."""
SHARE_STEP = tl.constexpr(16)
"""Tokens of a share are a multiple of it."""


class Tile(NamedTuple):
    """How a program goes through its tokens."""

    tokens: int
    """At a time; at least WIDTH_MIN, a power of two."""
    rows_max: int
    """Query heads of one program; those of a larger group are spread over several."""
    warps: int
    stages: int
    """Tiles that are on their way at once."""


def tile_for(dim: int, dtype: torch.dtype) -> Tile:
    """Within 2 % of the fastest on an H100 for contexts of 256 and 2,048, dim 128, in half precision."""
    if dtype is torch.float32:
        return Tile(32 if dim <= 128 else 16, 16, 4, 2)
    return Tile(64, 64, 4, 3) if dim <= 128 else Tile(32, 64, 4, 3)


def splits_for(sequences: int, kv_heads: int, multiprocessors: int) -> int:
    """The least power of two, at most SPLITS_MAX, with which there are programs enough to fill the chip."""
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, sequences * kv_heads))
    return min(SPLITS_MAX, 1 << (wanted - 1).bit_length())


class Partials:
    """What the programs of split sequences found: room for `n` sequences in `splits` shares each.

    One may serve many calls, one after the other on a stream, also with fewer sequences in more shares.
    """

    def __init__(self, n: int, heads: int, dim: int, splits: int, device: torch.device) -> None:
        rows = n * splits * heads
        self.sums = torch.empty(rows * dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(rows * 2, dtype=torch.float32, device=device)

    def holds(self, rows: int, dim: int) -> bool:
        """Whether there is room for n · splits · heads rows."""
        return self.stats.numel() >= 2 * rows and self.sums.numel() >= rows * dim


def decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, out: Tensor,
    flavour: Flavour, *, splits: int, partials: Partials | None = None,
) -> None:  # fmt: skip
    """[n, heads, dim] over one layer of the cache, to `out` [n, heads, dim] or [n, heads · dim], contiguous.

    `query`: any stride between its rows. `keys`, `values`: [blocks, block_tokens, kv_heads, dim],
    contiguous. `tables` int32 [n, m], any stride between its rows. `lengths` int32 [n]: the tokens of each
    sequence that are in the cache, its own new one included; 0 for a row of padding, whose cells become
    zeros. With `splits` > 1 the call needs `partials`, or makes its own. Raises ValueError if those are
    too small.
    """
    tile = tile_for(query.shape[-1], query.dtype)
    decode_by(tile, query, keys, values, tables, lengths, out, flavour, splits, partials)


def decode_by(
    tile: Tile, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, out: Tensor,
    flavour: Flavour, splits: int, partials: Partials | None,
) -> None:  # fmt: skip
    """`decode` with a tile of the caller's choice."""
    n, heads, dim = query.shape
    if not n:
        return
    sums, stats = out, out
    if splits > 1:
        rows = n * splits * heads
        if partials is None:
            partials = Partials(n, heads, dim, splits, query.device)
        elif not partials.holds(rows, dim):
            raise ValueError(f"no room for the partial results of {n} sequences in {splits} shares")
        sums, stats = partials.sums, partials.stats
    block_tokens, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    rows_at_once = min(tile.rows_max, max(WIDTH_MIN, 1 << (group - 1).bit_length()))
    slope, cap = bend(flavour)
    width = width_of(dim)
    _decode[(kv_heads * -(-group // rows_at_once), splits, n)](
        query, keys, values, tables, lengths, out, sums, stats,
        query.stride(0), tables.stride(0), flavour.window or UNLIMITED, slope, cap,
        heads, kv_heads, dim, width, block_tokens, rows_at_once, tile.tokens,
        splits > 1, flavour.softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(heads, n)](
            sums, stats, out, splits, heads, dim, width, 1 << (splits - 1).bit_length(), num_warps=4
        )


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode(
    query, keys, values, tables, lengths, out, sums, stats,
    query_stride, table_stride, window, slope, cap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    SPLIT: tl.constexpr, CAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: key heads · parts of a group, shares, sequences."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // PARTS
    share = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    first = tl.maximum(length - window, 0)
    last = length
    if SPLIT:
        count = tl.cdiv(length - first, tl.num_programs(1))
        count = tl.cdiv(count, SHARE_STEP) * SHARE_STEP
        first = first + share * count
        last = tl.minimum(length, first + count)

    rows = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows
    dims = tl.arange(0, WIDTH)
    live = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    own = tl.load(
        query + sequence * query_stride + heads[:, None] * DIM + dims[None, :], mask=live, other=0.0
    )

    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    table = tables + sequence * table_stride
    blocks = find_blocks(table, first, last, BLOCK_TOKENS, TOKENS)
    for start in range(first, last, TOKENS):
        following = find_blocks(table, start + TOKENS, last, BLOCK_TOKENS, TOKENS)
        best, total, mixed = absorb(
            own, best, total, mixed, keys + kv_head * DIM, values + kv_head * DIM,
            blocks, start, last, rows, window, slope, cap,
            KV_HEADS * DIM, DIM, WIDTH, BLOCK_TOKENS, TOKENS, True, False, False, CAPPED,
        )  # fmt: skip
        blocks = following

    if SPLIT:
        row = (sequence * tl.num_programs(1) + share) * HEADS + heads
        tl.store(stats + row * 2, best, mask=rows < GROUP)
        tl.store(stats + row * 2 + 1, total, mask=rows < GROUP)
        tl.store(sums + row[:, None] * DIM + dims[None, :], mixed, mask=live)
    else:
        row = sequence * HEADS + heads
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + row[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    sums, stats, out, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: heads, sequences. A share without tokens has a total of 0."""
    sequence = tl.program_id(1).to(tl.int64)
    shares = tl.arange(0, SPLITS)
    dims = tl.arange(0, WIDTH)
    there = shares < splits
    row = (sequence * splits + shares) * HEADS + tl.program_id(0)
    best = tl.load(stats + row * 2, mask=there, other=LOWEST)
    total = tl.load(stats + row * 2 + 1, mask=there, other=0.0)
    found = tl.load(
        sums + row[:, None] * DIM + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0
    )
    weight = tl.exp2(best - tl.max(best, 0))
    whole = tl.sum(weight * total, 0)
    result = tl.sum(weight[:, None] * found, 0) / tl.where(whole > 0, whole, 1.0)
    place = (sequence * HEADS + tl.program_id(0)) * DIM + dims
    tl.store(out + place, result.to(out.dtype.element_ty), mask=dims < DIM)
