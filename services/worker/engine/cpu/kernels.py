"""The CPU kernels with tensors as arguments.

Each method checks what the C code takes for granted: dtype, contiguity of the last dimension, shapes.
While one runs, Python's lock is free. One `Kernels` has one pool of threads and is not thread-safe.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.worker.engine.cpu.library import open_library, openmp_team

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
PARTS = ("products", "attention", "place", "norms", "gates", "single products")
"""Kinds of work that the kernels keep account of: those of a stack, and products outside one."""
GATES = {"silu": 0, "gelu_tanh": 1}
PANEL = 32
"""Output columns that are stored together."""
LANES = 16
DIM_MAX = 256
"""The widest head."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A packed weight of [outputs, inputs]."""

    words: Tensor
    narrow: bool
    """Held in bfloat16; otherwise in float32."""
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys [blocks, kv_heads, dim, lanes] and values [blocks, kv_heads, block_tokens, width] of one layer.

    `lanes` is block_tokens and `width` is dim, each rounded up to 16.
    """

    keys: Tensor
    values: Tensor
    block_tokens: int
    dim: int

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]


def padded(count: int) -> int:
    """Rounded up to whole vectors."""
    return -(-count // LANES) * LANES


class Kernels:
    """Raises RuntimeError when no library fits: ask `available` first."""

    def __init__(self, threads: int, *, beside_openmp: bool) -> None:
        """`beside_openmp`: products are a library's that runs on OpenMP, whose threads are then borrowed."""
        library = open_library()
        if library is None:
            raise RuntimeError("no compiled CPU kernels fit this processor")
        self._library = library
        team = openmp_team() if beside_openmp else None
        self._pool = library.tl_pool_new(threads, team)
        self._typed = {
            dtype: {
                name: getattr(library, f"tl_{name}_{suffix}")
                for name in ("norm", "gate", "place", "store", "attend")
            }
            for dtype, suffix in SUFFIXES.items()
        }

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self._library.tl_pool_free(self._pool)
            self._pool = None

    def spent_ns(self) -> dict[str, int]:
        """Nanoseconds by kind of work, since these kernels were made."""
        found = (ctypes.c_int64 * len(PARTS))()
        self._library.tl_spent(self._pool, found)
        return dict(zip(PARTS, found, strict=True))

    def pack(self, weight: Tensor) -> Panels:
        """A weight [outputs, inputs] in float32 or bfloat16.

        One whose numbers are all bfloat16's is held so, at half the bytes and without any loss.
        """
        outputs, inputs = weight.shape
        narrow = weight.to(torch.bfloat16)
        fits = weight.dtype is torch.bfloat16 or torch.equal(narrow.to(weight.dtype), weight)
        count = -(-outputs // PANEL) * inputs * (LANES if fits else PANEL)
        words = torch.empty(count, dtype=torch.int32 if fits else torch.float32)
        source = narrow.contiguous() if fits else weight.to(torch.float32).contiguous()
        pack = self._library.tl_pack16 if fits else self._library.tl_pack32
        pack(source.data_ptr(), outputs, inputs, words.data_ptr())
        return Panels(words, fits, outputs, inputs)

    def linear(self, x: Tensor, weight: Panels, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """float32 [..., inputs] to [..., outputs]; with `onto` that much is added to it, in place."""
        x = x.contiguous()
        if x.dtype is not torch.float32 or x.shape[-1] != weight.inputs:
            raise ValueError(f"a product of {weight.inputs} inputs got {x.dtype} {tuple(x.shape)}")
        out = x.new_empty((*x.shape[:-1], weight.outputs)) if onto is None else onto
        if not out.is_contiguous() or out.numel() * weight.inputs != x.numel() * weight.outputs:
            raise ValueError(f"a product cannot be added to {tuple(out.shape)}")
        self._library.tl_linear(
            self._pool, x.data_ptr(), weight.words.data_ptr(), int(weight.narrow),
            None if bias is None else bias.data_ptr(), out.data_ptr(),
            x.numel() // weight.inputs, weight.inputs, weight.outputs, int(onto is not None),
        )  # fmt: skip
        return out

    def stack(
        self,
        shape: ctypes.Structure,
        layers: ctypes.Array[Any],
        step: ctypes.Structure,
        x: Tensor,
        space: Tensor,
    ) -> None:
        """All layers of stack.py, over x [tokens, width] in place; `space` is for what lies between."""
        self._library.tl_stack(
            self._pool, ctypes.byref(shape), layers, ctypes.byref(step), x.data_ptr(), space.data_ptr()
        )

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of [..., width]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._typed[x.dtype]["norm"](
            self._pool, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // width, width
        )
        return out

    def gate(self, both: Tensor, gate: str) -> Tensor:
        """[tokens, 2 · width], the gate's input first, to gate(first) · second."""
        tokens, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty((tokens, width))
        self._typed[both.dtype]["gate"](
            self._pool, both.data_ptr(), out.data_ptr(), tokens, width, GATES[gate]
        )
        return out

    def place(
        self, qkv: Tensor, cosines: Tensor, sines: Tensor, norms: tuple[Tensor, Tensor, float] | None,
        slots: Tensor, heads: int, layer: Layer,
    ) -> None:  # fmt: skip
        """Norms and rotates queries and keys in place, and stores keys and values.

        `qkv` is [tokens, heads + 2 · kv_heads, dim].

        `cosines` and `sines` are [tokens, rotated part of a head], `slots` [tokens] int64.
        """
        query_norm, key_norm, eps = norms if norms is not None else (None, None, 0.0)
        self._typed[qkv.dtype]["place"](
            self._pool, qkv.data_ptr(), cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1],
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(), eps,
            slots.data_ptr(), qkv.shape[0], heads, *_cache(layer),
        )  # fmt: skip

    def store(self, keys: Tensor, values: Tensor, slots: Tensor, layer: Layer) -> None:
        """Keys and values [tokens, kv_heads, dim], of any strides but the last, to `slots`."""
        keys, values = _rows(keys), _rows(values)
        self._typed[keys.dtype]["store"](
            self._pool, keys.data_ptr(), keys.stride(0), keys.stride(1),
            values.data_ptr(), values.stride(0), values.stride(1),
            slots.data_ptr(), keys.shape[0], *_cache(layer),
        )  # fmt: skip

    def attend(
        self, query: Tensor, tables: Tensor, chunks: Tensor, layer: Layer,
        *, scale: float, window: int, softcap: float,
    ) -> Tensor:  # fmt: skip
        """[tokens, heads, dim], of any strides but the last, over the cache: the same, contiguous.

        `chunks` [n, 4] int64: first row, rows, position of the first, row of `tables` [m, blocks] int64.
        """
        query = _rows(query)
        out = query.new_empty(query.shape)
        self._typed[query.dtype]["attend"](
            self._pool, query.data_ptr(), query.stride(0), query.stride(1), out.data_ptr(),
            tables.data_ptr(), tables.stride(0), chunks.data_ptr(), chunks.shape[0],
            query.shape[1], window, scale, softcap, *_cache(layer),
        )  # fmt: skip
        return out


def available() -> bool:
    """Whether compiled kernels fit this processor."""
    return open_library() is not None


def _cache(layer: Layer) -> tuple[int, int, int, int, int]:
    return (
        layer.keys.data_ptr(), layer.values.data_ptr(), layer.kv_heads, layer.dim, layer.block_tokens,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
