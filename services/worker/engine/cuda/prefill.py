"""Attention of prompt chunks over the paged cache, their own keys and values being in it already.

Chunks are cut into tiles of a few tokens (on the host, `tiles`), and a program takes one tile for one key
head, with several query heads of its group as further rows of the products. It goes through the keys that
any of its tokens sees: without masks where all see all, with masks at the diagonal and at a window's edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from services.worker.engine.cuda.softmax import LOWEST, UNLIMITED, absorb, bend, find_blocks, width_of

if TYPE_CHECKING:
    from services.worker.engine.attention import Flavour


class Tile(NamedTuple):
    """The shape of a program's work."""

    rows: int
    """Tokens of a tile."""
    rows_max: int
    """Rows of the products: tokens, times query heads taken together."""
    keys: int
    """Tokens of the context at a time."""
    warps: int
    """For `rows_max` rows; fewer for fewer."""
    stages: int
    """Tiles of keys that are on their way at once."""


def tile_for(dim: int, dtype: torch.dtype) -> Tile:
    """Fits an H100's shared memory; no other tile was tried there yet."""
    if dtype is torch.float32:
        return Tile(16, 32, 32 if dim <= 64 else 16, 4, 2)
    return Tile(64, 128, 64, 8, 3) if dim <= 128 else Tile(64, 64, 64, 8, 2)


def tile_rows(dim: int, dtype: torch.dtype) -> int:
    """Tokens of a tile, at most, that `prefill` takes."""
    return tile_for(dim, dtype).rows


def tiles(chunks: NDArray[np.int64], rows_per_tile: int) -> NDArray[np.int32]:
    """Chunks [n, 4] to tiles [t, 4]: first row, rows, position of the first, row of the tables."""
    counts = -(-chunks[:, 1] // rows_per_tile)
    owners = np.repeat(np.arange(len(chunks)), counts)
    offsets = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows_per_tile
    first, rows, positions, table = chunks[owners].T
    cut = np.minimum(rows - offsets, rows_per_tile)
    return np.stack([first + offsets, cut, positions + offsets, table], 1).astype(np.int32)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, tiles: Tensor, out: Tensor, flavour: Flavour
) -> None:
    """The rows of `query` [tokens, heads, dim] that `tiles` names, to the same of `out`, contiguous.

    `query`: any stride between its rows. `keys`, `values`: [blocks, block_tokens, kv_heads, dim],
    contiguous. `tables` int32 [n, m], any stride between its rows. `tiles` int32 [t, 4], of at most
    `tile_rows` tokens each; one of 0 rows does nothing.
    """
    prefill_by(tile_for(query.shape[-1], query.dtype), query, keys, values, tables, tiles, out, flavour)


def prefill_by(
    tile: Tile, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, tiles: Tensor, out: Tensor,
    flavour: Flavour,
) -> None:  # fmt: skip
    """`prefill` with a tile of the caller's choice, by whose `rows` the tiles were cut."""
    if not tiles.shape[0]:
        return
    _, heads, dim = query.shape
    block_tokens, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    together = min(1 << (group - 1).bit_length(), tile.rows_max // tile.rows)
    rows = tile.rows * together
    slope, cap = bend(flavour)
    _prefill[(kv_heads * -(-group // together), tiles.shape[0])](
        query, keys, values, tables, tiles, out,
        query.stride(0), tables.stride(0), flavour.window or UNLIMITED, slope, cap,
        heads, kv_heads, dim, width_of(dim), block_tokens, tile.rows, rows, tile.keys,
        flavour.window > 0, flavour.softcap > 0,
        num_warps=max(4, tile.warps * rows // tile.rows_max), num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill(
    query, keys, values, tables, tiles, out,
    query_stride, table_stride, window, slope, cap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: key heads · parts of a group, tiles. Rows are heads, then tokens."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOGETHER: tl.constexpr = ROWS // TILE_ROWS
    PARTS: tl.constexpr = (GROUP + TOGETHER - 1) // TOGETHER
    ROW: tl.constexpr = KV_HEADS * DIM
    kv_head = tl.program_id(0) // PARTS
    # The last tiles of a chunk have the longest context: they begin first.
    tile = tiles + (tl.num_programs(1) - 1 - tl.program_id(1)) * 4
    first_row, count = tl.load(tile), tl.load(tile + 1)
    position, sequence = tl.load(tile + 2), tl.load(tile + 3)

    rows = tl.arange(0, ROWS)
    tokens = rows % TILE_ROWS
    member = (tl.program_id(0) % PARTS) * TOGETHER + rows // TILE_ROWS
    heads = kv_head * GROUP + member
    dims = tl.arange(0, WIDTH)
    live = ((tokens < count) & (member < GROUP))[:, None] & (dims < DIM)[None, :]
    flat = (first_row + tokens).to(tl.int64)
    own = tl.load(
        query + flat[:, None] * query_stride + heads[:, None] * DIM + dims[None, :], mask=live, other=0.0
    )

    positions = position + tokens
    last = position + count
    begin = 0
    clear = 0
    if WINDOWED:
        # From `begin` on some row sees the keys, from `clear` on, whole tiles further, the window hides none.
        begin = tl.maximum(position - window + 1, 0)
        clear = begin + tl.cdiv(tl.maximum(last - window, begin) - begin, KEYS) * KEYS
    # Up to `full`, whole tiles further again, all keys are those of tokens before the first row or its own.
    full = clear + tl.maximum(position + 1 - clear, 0) // KEYS * KEYS

    keys += kv_head * DIM
    values += kv_head * DIM
    table = tables + sequence.to(tl.int64) * table_stride
    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    blocks = find_blocks(table, begin, last, BLOCK_TOKENS, KEYS)
    if WINDOWED:
        for start in range(begin, clear, KEYS):
            following = find_blocks(table, start + KEYS, last, BLOCK_TOKENS, KEYS)
            best, total, mixed = absorb(
                own, best, total, mixed, keys, values, blocks, start, last, positions, window, slope, cap,
                ROW, DIM, WIDTH, BLOCK_TOKENS, KEYS, True, True, True, CAPPED,
            )  # fmt: skip
            blocks = following
    for start in range(clear, full, KEYS):
        following = find_blocks(table, start + KEYS, last, BLOCK_TOKENS, KEYS)
        best, total, mixed = absorb(
            own, best, total, mixed, keys, values, blocks, start, last, positions, window, slope, cap,
            ROW, DIM, WIDTH, BLOCK_TOKENS, KEYS, False, False, False, CAPPED,
        )  # fmt: skip
        blocks = following
    for start in range(full, last, KEYS):
        following = find_blocks(table, start + KEYS, last, BLOCK_TOKENS, KEYS)
        best, total, mixed = absorb(
            own, best, total, mixed, keys, values, blocks, start, last, positions, window, slope, cap,
            ROW, DIM, WIDTH, BLOCK_TOKENS, KEYS, True, True, WINDOWED, CAPPED,
        )  # fmt: skip
        blocks = following

    # Rows past the tile's last token may have seen nothing.
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    place = (flat[:, None] * HEADS + heads[:, None]) * DIM + dims[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=live)
