"""Online softmax over keys and values that are read through a block table.

A running maximum, sum and mixture for each row of queries, brought up to date with one tile of tokens at
a time (Milakov & Gimelshein 2018; Dao 2022). Scores are in powers of two, for exp2 is the GPU's own.
Knows nothing of which program takes which tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from services.worker.engine.attention import Flavour

UNLIMITED = 2**30
"""The window of a layer that has none; more than any context's tokens."""
WIDTH_MIN = 16
"""The least that a matrix product takes in any direction."""
LOWEST = tl.constexpr(-1.0e30)
"""The maximum of no scores: finite, so that the difference to it is never that of two infinities."""


def width_of(dim: int) -> int:
    """A head's dimensions, padded."""
    return max(WIDTH_MIN, 1 << (dim - 1).bit_length())


def bend(flavour: Flavour) -> tuple[float, float]:
    """(slope, cap): a score is slope · product, or cap · tanh(slope · product) where there is a cap."""
    if flavour.softcap:
        return flavour.scale / flavour.softcap, flavour.softcap * math.log2(math.e)
    return flavour.scale * math.log2(math.e), 0.0


@triton.jit
def tanh(x):
    """Of float32; never overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def read_rows(
    base,
    at,
    seen,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[n, WIDTH] from [n] places; zeros past DIM and, if MASKED, where a row is not `seen`."""
    dims = tl.arange(0, WIDTH)
    cells = base + at[:, None] + dims[None, :]
    if MASKED:
        mask = seen[:, None] if DIM == WIDTH else seen[:, None] & (dims < DIM)[None, :]
        return tl.load(cells, mask=mask, other=0.0)
    return tl.load(cells) if DIM == WIDTH else tl.load(cells, mask=(dims < DIM)[None, :], other=0.0)


@triton.jit
def find_blocks(table, start, last, BLOCK_TOKENS: tl.constexpr, TOKENS: tl.constexpr):
    """Blocks of tokens start … start + TOKENS, [TOKENS] int64; those from `last` on are in block 0.

    Read a tile ahead of the keys and values, which can then be fetched before they are needed.
    """
    tokens = start + tl.arange(0, TOKENS)
    return tl.load(table + tokens // BLOCK_TOKENS, mask=tokens < last, other=0).to(tl.int64)


@triton.jit
def absorb(
    query, best, total, mixed, keys, values, blocks,
    start, last, positions, window, slope, cap,
    ROW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Takes in tokens start … start + TOKENS, which are in `blocks`; the new (best, total, mixed).

    `keys` and `values` point to a head in the cache's first slot, ROW is a slot's elements. MASKED: tokens
    from `last` on do not exist and are not read. CAUSAL: a row sees none after its own of `positions`;
    WINDOWED: nor those `window` or more before it.
    """
    tokens = start + tl.arange(0, TOKENS)
    exists = tokens < last
    at = blocks * (BLOCK_TOKENS * ROW) + (tokens % BLOCK_TOKENS) * ROW
    key = read_rows(keys, at, exists, DIM, WIDTH, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * slope
    if CAPPED:
        scores = tanh(scores) * cap
    if MASKED:
        seen = exists[None, :]
        if CAUSAL:
            seen = seen & (tokens[None, :] <= positions[:, None])
        if WINDOWED:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    value = read_rows(values, at, exists, DIM, WIDTH, MASKED)
    higher = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(best - higher)
    total = total * fade + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return higher, total, mixed
