"""What a plain layer does to its numbers between the products and the attention, one kernel for each part.

Everything is computed in float32 and rounded once, to the dtype of the input. One program takes a token,
or a part of one; the inputs are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Norms = tuple[Tensor, Tensor, float]
"""Weights of the norms of query and key, and their epsilon."""

GATES = {"silu": 0, "gelu_tanh": 1}
NORM_WIDTH_MAX = 8192
"""Numbers that one program holds at once; a wider row is read twice."""
GATE_STEP = 1024
PLACE_NUMBERS = 2048
"""Of one program, in several heads of a token."""
ELEMENTS_PER_WARP = 512


def place(
    qkv: Tensor, cosines: Tensor, sines: Tensor, norms: Norms | None, heads: int, kv_heads: int,
    keys: Tensor, values: Tensor, slots: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Norms and rotates queries and keys; queries go to `out`, keys and values into the cache.

    `qkv`: [tokens, (heads + 2 · kv_heads) · dim], any stride between its rows. `cosines`, `sines`: [tokens,
    rotated part of a head]; a head's rest stays as it is. `norms`: of each head, before the rotation.
    `keys`, `values`: one layer, [blocks, block_tokens, kv_heads, dim], contiguous. `slots` int64 [tokens]:
    block · block_tokens + offset; a row of padding has a negative one, and nothing of it is written.
    `out`: [tokens, heads, dim], contiguous.
    """
    tokens, dim, turned = qkv.shape[0], keys.shape[-1], cosines.shape[-1]
    if not tokens:
        return
    half = _power(turned // 2)
    every = heads + 2 * kv_heads
    at_once = min(_power(every), max(1, PLACE_NUMBERS // (2 * half)))
    query_weight, key_weight, epsilon = norms if norms is not None else (qkv, qkv, 0.0)
    _place[(-(-every // at_once), tokens)](
        qkv, cosines, sines, query_weight, key_weight, keys, values, slots, out,
        qkv.stride(0), cosines.stride(0), sines.stride(0), epsilon,
        heads, kv_heads, dim, turned, half, _power(dim - turned), at_once, norms is not None, num_warps=4,
    )  # fmt: skip


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """[kv_heads, tokens, dim] of any strides into one layer of the cache; `slots` as for `place`."""
    kv_heads, tokens, dim = key.shape
    if not tokens:
        return
    width = _power(dim)
    at_once = min(_power(kv_heads), max(1, PLACE_NUMBERS // width))
    _store[(-(-kv_heads // at_once), tokens)](
        key, value, keys, values, slots, *key.stride(), *value.stride(),
        kv_heads, dim, width, at_once, num_warps=4,
    )  # fmt: skip


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of [tokens, width]; any stride between the rows."""
    tokens, width = x.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        at_once = min(_power(width), NORM_WIDTH_MAX)
        _norm[(tokens,)](
            x, weight, out, x.stride(0), epsilon, width, at_once, num_warps=_warps(at_once)
        )  # fmt: skip
    return out


def gate(both: Tensor, name: str) -> Tensor:
    """[tokens, 2 · width], the gate's input first, to gate(first) · second; `name` is one of GATES."""
    tokens, width = both.shape[0], both.shape[1] // 2
    out = torch.empty((tokens, width), dtype=both.dtype, device=both.device)
    if tokens:
        at_once = min(_power(width), GATE_STEP)
        _gate[(-(-width // at_once), tokens)](
            both, out, both.stride(0), width, at_once, GATES[name], num_warps=_warps(2 * at_once)
        )  # fmt: skip
    return out


def _power(count: int) -> int:
    """The least power of two that is not less; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _warps(elements: int) -> int:
    return max(1, min(16, elements // ELEMENTS_PER_WARP))


@triton.jit
def _place(
    qkv, cosines, sines, query_weight, key_weight, keys, values,
    slots, out, qkv_stride, cosines_stride, sines_stride, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, AT_ONCE: tl.constexpr, NORMED: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: groups of heads, tokens. A head is two halves that are each other's partners, and a rest."""
    MIDDLE: tl.constexpr = TURNED // 2
    token = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    numbers = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    live = (numbers < HEADS + 2 * KV_HEADS) & (slot >= 0)
    turns = (numbers < HEADS + KV_HEADS)[:, None]
    source = qkv + token * qkv_stride + (numbers * DIM)[:, None]
    half = tl.arange(0, HALF)
    inside = half < MIDDLE
    cells = live[:, None] & inside[None, :]
    low = tl.load(source + half[None, :], mask=cells, other=0.0).to(tl.float32)
    high = tl.load(source + MIDDLE + half[None, :], mask=cells, other=0.0).to(tl.float32)
    if REST > 0:
        more = tl.arange(0, REST)
        extra = live[:, None] & (more < DIM - TURNED)[None, :]
        rest = tl.load(source + TURNED + more[None, :], mask=extra, other=0.0).to(tl.float32)

    if NORMED:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        size = tl.rsqrt(squares / DIM + epsilon)[:, None]
        of_low = _weights(query_weight, key_weight, numbers, half, inside, HEADS)
        of_high = _weights(query_weight + MIDDLE, key_weight + MIDDLE, numbers, half, inside, HEADS)
        low = tl.where(turns, low * size * of_low, low)
        high = tl.where(turns, high * size * of_high, high)
        if REST > 0:
            of_rest = _weights(
                query_weight + TURNED, key_weight + TURNED, numbers, more, more < DIM - TURNED, HEADS
            )
            rest = tl.where(turns, rest * size * of_rest, rest)

    cosine, sine = cosines + token * cosines_stride, sines + token * sines_stride
    low_cosine = tl.load(cosine + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    low_sine = tl.load(sine + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_cosine = tl.load(cosine + MIDDLE + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_sine = tl.load(sine + MIDDLE + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    new_low = tl.where(turns, low * low_cosine - high * low_sine, low)
    new_high = tl.where(turns, high * high_cosine + low * high_sine, high)

    _scatter(new_low, half, inside, numbers, live, token, slot, keys, values, out, HEADS, KV_HEADS, DIM)
    _scatter(
        new_high, MIDDLE + half, inside, numbers, live, token, slot, keys, values, out, HEADS, KV_HEADS, DIM
    )
    if REST > 0:
        _scatter(
            rest, TURNED + more, more < DIM - TURNED, numbers, live, token, slot, keys, values, out,
            HEADS, KV_HEADS, DIM,
        )  # fmt: skip


@triton.jit
def _weights(
    query_weight,
    key_weight,
    numbers,
    at,
    inside,
    HEADS: tl.constexpr,
):
    """[heads, dims] of the norms' weights: those of queries or those of keys."""
    of_query = tl.load(query_weight + at, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where((numbers < HEADS)[:, None], of_query[None, :], of_key[None, :])


@triton.jit
def _scatter(
    x, at, inside, numbers, live, token, slot,
    keys, values, out, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """[heads, dims] to the queries, the keys and the values, each head where it belongs."""
    x = x.to(out.dtype.element_ty)
    is_query, is_value = numbers < HEADS, numbers >= HEADS + KV_HEADS
    is_key = (numbers >= HEADS) & (numbers < HEADS + KV_HEADS)
    cells = inside[None, :]
    queries = out + token * (HEADS * DIM) + (numbers * DIM)[:, None] + at[None, :]
    tl.store(queries, x, mask=(live & is_query)[:, None] & cells)
    cached = slot * (KV_HEADS * DIM) + ((numbers - HEADS) * DIM)[:, None] + at[None, :]
    tl.store(keys + cached, x, mask=(live & is_key)[:, None] & cells)
    tl.store(values + (cached - KV_HEADS * DIM), x, mask=(live & is_value)[:, None] & cells)


@triton.jit
def _store(
    key, value, keys, values, slots,
    key_head, key_token, key_dim, value_head, value_token, value_dim,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: groups of heads, tokens."""
    token = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    heads = (tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    live = ((heads < KV_HEADS) & (slot >= 0))[:, None] & (dims < DIM)[None, :]
    place = slot * (KV_HEADS * DIM) + heads[:, None] * DIM + dims[None, :]
    source = key + token * key_token + heads[:, None] * key_head + dims[None, :] * key_dim
    tl.store(keys + place, tl.load(source, mask=live, other=0.0), mask=live)
    source = value + token * value_token + heads[:, None] * value_head + dims[None, :] * value_dim
    tl.store(values + place, tl.load(source, mask=live, other=0.0), mask=live)


@triton.jit
def _norm(
    x,
    weight,
    out,
    stride,
    epsilon,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    out += row * WIDTH
    lanes = tl.arange(0, AT_ONCE)
    if WIDTH <= AT_ONCE:
        inside = lanes < WIDTH
        part = tl.load(x + lanes, mask=inside, other=0.0).to(tl.float32)
        scales = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        size = tl.rsqrt(tl.sum(part * part, 0) / WIDTH + epsilon)
        tl.store(out + lanes, (part * size * scales).to(out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros([AT_ONCE], tl.float32)
        for start in range(0, WIDTH, AT_ONCE):
            at = start + lanes
            part = tl.load(x + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            squares += part * part
        size = tl.rsqrt(tl.sum(squares, 0) / WIDTH + epsilon)
        for start in range(0, WIDTH, AT_ONCE):
            at = start + lanes
            part = tl.load(x + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            scales = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            tl.store(out + at, (part * size * scales).to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _gate(
    both,
    out,
    stride,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """Grid: parts of a row, rows. KIND is a value of GATES."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    first = tl.load(both + row * stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    second = tl.load(both + row * stride + WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    steep = first
    if KIND == 1:
        # x · (1 + tanh(y)) / 2 is x · sigmoid(2 · y), which loses nothing where the sum would cancel.
        steep = 1.5957691216057308 * first * (1.0 + 0.044715 * first * first)
    e = tl.exp(-tl.abs(steep))
    acted = first * tl.where(steep < 0, e, 1.0) / (1.0 + e)
    tl.store(out + row * WIDTH + at, (acted * second).to(out.dtype.element_ty), mask=at < WIDTH)
