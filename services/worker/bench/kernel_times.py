"""How long the GPU's kernels take at the shape of a layer of Llama 3 8B, beside the floor of each.

A floor is what the bytes that must be moved take at the memory's speed, or the operations at the units',
whichever is longer. Between two runs the caches are emptied, as the other layers would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
import triton
from torch import Tensor

from services.worker.bench.kernel_errors import LLAMA, random
from services.worker.engine.cuda import decode as decoding
from services.worker.engine.cuda import elementwise
from services.worker.engine.cuda import prefill as prefilling

BATCHES, CONTEXTS = (1, 32, 128, 256), (256, 2048)
PROMPTS = ((16, 128), (4, 512), (1, 2048))
"""Chunks, and the rows of each."""
TOKENS = (256, 2048)
HIDDEN, INTERMEDIATE = 4096, 14336
DTYPE = torch.bfloat16
WARM_UP_MS, REPEAT_MS = 10, 50
"""Of one figure."""
OUT_OF_RESOURCES = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError)

DECODE_TILES = [
    decoding.Tile(tokens, 64, warps, stages)
    for tokens, warps, stages in product((32, 64, 128), (2, 4, 8), (2, 3, 4, 5))
]
PREFILL_TILES = [
    prefilling.Tile(rows, rows_max, keys, warps, stages)
    for rows, rows_max in ((32, 64), (32, 128), (64, 64), (64, 128), (128, 128))
    for keys, warps, stages in product((32, 64, 128), (4, 8), (2, 3, 4))
]


@dataclass(frozen=True)
class Time:
    """One figure."""

    kernel: str
    what: str
    how: str
    """Splits and tile; empty where there is no choice."""
    seconds: float
    bytes: float
    operations: float

    def floor_s(self, bytes_per_s: float, flops: float) -> float:
        """The least that a machine of such a speed needs."""
        return max(self.bytes / bytes_per_s, self.operations / flops)


def measure(call: Callable[[], object]) -> float | None:
    """Seconds, the median; None where the kernel does not fit the device."""
    try:
        call()
        return float(triton.testing.do_bench(call, WARM_UP_MS, REPEAT_MS, return_mode="median")) * 1e-3
    except OUT_OF_RESOURCES:
        return None


def cached(tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and the blocks of so many tokens in no order."""
    blocks = tokens // LLAMA.block_tokens
    sizes = (blocks, LLAMA.block_tokens, LLAMA.kv_heads, LLAMA.dim)
    order = torch.randperm(blocks, generator=draw, device=draw.device).to(torch.int32)
    return random(draw, DTYPE, *sizes), random(draw, DTYPE, *sizes), order


def decodes(draw: torch.Generator, every: bool) -> Iterator[Time]:
    """The tile in use with several splits; with `every` all tiles."""
    for batch, context in product(BATCHES, CONTEXTS):
        yield from _decodes(draw, batch, context, every)


def _decodes(draw: torch.Generator, batch: int, context: int, every: bool) -> Iterator[Time]:
    keys, values, order = cached(batch * context, draw)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=draw.device)
    query = random(draw, DTYPE, batch, LLAMA.heads, LLAMA.dim)
    out = torch.empty_like(query)
    processors = torch.cuda.get_device_properties(draw.device).multi_processor_count
    chosen = decoding.splits_for(batch, LLAMA.kv_heads, processors)
    best = decoding.tile_for(LLAMA.dim, DTYPE)
    size = 2 * (keys.numel() + values.numel() + 2 * query.numel())
    for splits in sorted({1, chosen, min(decoding.SPLITS_MAX, 2 * chosen), max(1, chosen // 2)}):
        room = decoding.Partials(batch, LLAMA.heads, LLAMA.dim, splits, draw.device)
        for tile in DECODE_TILES if every else [best]:
            seconds = measure(partial(
                decoding.decode_by, tile, query, keys, values, order.view(batch, -1), lengths, out,
                LLAMA.flavour, splits, room,
            ))  # fmt: skip
            if seconds is not None:
                how = f"{splits} splits{' *' * (splits == chosen)}, {show(tile, best)}"
                yield Time("decode", f"{batch} x {context}", how, seconds, size, 4 * query.numel() * context)


def prefills(draw: torch.Generator, every: bool) -> Iterator[Time]:
    """Whole prompts; with `every` all tiles."""
    for count, rows in PROMPTS:
        yield from _prefills(draw, count, rows, every)


def _prefills(draw: torch.Generator, count: int, rows: int, every: bool) -> Iterator[Time]:
    keys, values, order = cached(count * rows, draw)
    query = random(draw, DTYPE, count * rows, LLAMA.heads, LLAMA.dim)
    out = torch.empty_like(query)
    numbers = np.arange(count)
    chunks = np.stack([numbers * rows, np.full(count, rows), np.zeros_like(numbers), numbers], 1)
    work = 4 * LLAMA.heads * LLAMA.dim * count * rows * (rows + 1) / 2
    size = 2 * (keys.numel() + values.numel() + 2 * query.numel())
    best = prefilling.tile_for(LLAMA.dim, DTYPE)
    for tile in PREFILL_TILES if every else [best]:
        cut = torch.from_numpy(prefilling.tiles(chunks, tile.rows)).to(draw.device)
        seconds = measure(partial(
            prefilling.prefill_by, tile, query, keys, values, order.view(count, -1), cut, out, LLAMA.flavour
        ))  # fmt: skip
        if seconds is not None:
            yield Time("prefill", f"{count} x {rows}", show(tile, best), seconds, size, work)


def elementwises(draw: torch.Generator) -> Iterator[Time]:
    """What lies between the products."""
    for tokens in TOKENS:
        for name, elements, call in _calls(draw, tokens):
            seconds = measure(call)
            if seconds is not None:
                yield Time(name, f"{tokens} tokens", "", seconds, 2 * elements, 0)


def _calls(draw: torch.Generator, tokens: int) -> list[tuple[str, int, Callable[[], object]]]:
    """Names, elements that are read and written, and the calls."""
    x, weight = random(draw, DTYPE, tokens, HIDDEN), random(draw, DTYPE, HIDDEN)
    both = random(draw, DTYPE, tokens, 2 * INTERMEDIATE)
    qkv = random(draw, DTYPE, tokens, (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.dim)
    cosines, sines = (random(draw, DTYPE, tokens, LLAMA.dim) for _ in range(2))
    keys, values, _ = cached(2 * tokens, draw)
    slots = torch.randperm(2 * tokens, generator=draw, device=draw.device)[:tokens]
    out = torch.empty(tokens, LLAMA.heads, LLAMA.dim, dtype=DTYPE, device=draw.device)
    place = partial(
        elementwise.place, qkv, cosines, sines, None, LLAMA.heads, LLAMA.kv_heads, keys, values, slots, out
    )
    return [
        ("place", 2 * qkv.numel() + 2 * cosines.numel(), place),
        ("norm", 2 * x.numel(), partial(elementwise.norm, x, weight, 1e-5)),
        ("gate", 3 * tokens * INTERMEDIATE, partial(elementwise.gate, both, "silu")),
    ]


def show(tile: decoding.Tile | prefilling.Tile, best: decoding.Tile | prefilling.Tile) -> str:
    """The one in use has a star."""
    return " ".join(f"{name} {value}" for name, value in tile._asdict().items()) + " *" * (tile == best)
