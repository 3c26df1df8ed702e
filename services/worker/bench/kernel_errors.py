"""The GPU's kernels against plain sums in float64, at the sizes of models: error norms, case by case.

Inputs are random and new for each seed, outputs are poisoned before each call, block tables are
permutations, and cells of the cache that no sequence holds are poison too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from services.worker.engine.attention import Flavour
from services.worker.engine.cuda import elementwise
from services.worker.engine.cuda.decode import decode
from services.worker.engine.cuda.prefill import prefill, tile_rows, tiles

ERROR_MAX = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
POISON = float("nan")


@dataclass(frozen=True)
class Case:
    """A kernel, its input, and how far its output is from the reference by norm."""

    kernel: str
    what: str
    error: Callable[[torch.dtype, torch.Generator], float]


@dataclass(frozen=True)
class Model:
    """What attention's kernels are compiled for."""

    heads: int
    kv_heads: int
    dim: int
    block_tokens: int = 16
    window: int = 0
    softcap: float = 0.0

    @property
    def flavour(self) -> Flavour:
        return Flavour(self.dim**-0.5, self.window, self.softcap)

    def __str__(self) -> str:
        more = f" window {self.window}" * bool(self.window) + f" cap {self.softcap}" * bool(self.softcap)
        return f"{self.heads}/{self.kv_heads} x {self.dim}, blocks of {self.block_tokens}{more}"


LLAMA = Model(32, 8, 128)
MODELS = (
    LLAMA,
    replace(LLAMA, window=300),
    Model(8, 4, 256, softcap=50.0, window=500),
    Model(8, 8, 64, 32),
    Model(9, 3, 80, 3),
    Model(28, 4, 128, 1),
    Model(16, 1, 96, 64),
    Model(71, 1, 64),
    Model(3, 1, 8),
)
SPLITS = (1, 4, 32)
LENGTHS = (1, 0, 2, 15, 16, 17, 63, 64, 65, 255, 256, 300, 513, 1100, 0)
"""Of decodes' contexts; 0 is padding."""
CHUNKS = ((1, 0), (5, 3), (64, 0), (130, 0), (129, 700), (600, 0), (17, 1000))
"""Rows and position of the first."""


def reference(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, flavour: Flavour) -> Tensor:
    """[rows, heads, dim] over [tokens, kv_heads, dim], in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    scores = torch.einsum("rhd,thd->hrt", query.double(), keys) * flavour.scale
    if flavour.softcap:
        scores = torch.tanh(scores / flavour.softcap) * flavour.softcap
    token = torch.arange(keys.shape[0], device=keys.device)
    hidden = token > positions[:, None]
    if flavour.window:
        hidden |= token <= positions[:, None] - flavour.window
    return torch.einsum("hrt,thd->rhd", torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), values)


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, by norm; NaN if anything was not written."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-20))


def random(draw: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, device=draw.device).to(dtype)


class World:
    """Sequences of the given lengths in a paged cache, one layer."""

    def __init__(self, model: Model, lengths: list[int], dtype: torch.dtype, draw: torch.Generator) -> None:
        size = model.block_tokens
        counts = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(counts) + 1, generator=draw, device=draw.device)
        sizes = (sum(counts) + 1, size, model.kv_heads, model.dim)
        self.keys, self.values = (
            torch.full(sizes, POISON, dtype=dtype, device=draw.device) for _ in range(2)
        )
        self.tables = torch.full(
            (len(lengths), max(counts) + 3), 2**30, dtype=torch.int32, device=draw.device
        )
        self.known: list[tuple[Tensor, Tensor]] = []
        for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks, order = order[:count], order[count:]
            self.tables[number, :count] = blocks
            slots = (blocks[:, None] * size + torch.arange(size, device=draw.device)).flatten()[:length]
            key, value = (random(draw, dtype, length, model.kv_heads, model.dim) for _ in range(2))
            self.keys.flatten(0, 1)[slots] = key
            self.values.flatten(0, 1)[slots] = value
            self.known.append((key, value))


def queries(model: Model, rows: int, dtype: torch.dtype, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A slice of wider rows, and a poisoned output."""
    wide = random(draw, dtype, rows, (model.heads + 2) * model.dim)
    query = wide[:, : model.heads * model.dim].view(rows, model.heads, model.dim)
    return query, torch.full(query.shape, POISON, dtype=dtype, device=draw.device)


def decode_error(
    model: Model, lengths: list[int], splits: int, dtype: torch.dtype, draw: torch.Generator
) -> float:
    world = World(model, lengths, dtype, draw)
    query, out = queries(model, len(lengths), dtype, draw)
    seen = torch.tensor(lengths, dtype=torch.int32, device=draw.device)
    decode(query, world.keys, world.values, world.tables, seen, out, model.flavour, splits=splits)
    wanted = torch.zeros(out.shape, dtype=torch.float64, device=draw.device)
    for row, length in enumerate(lengths):
        if length:
            last = torch.tensor([length - 1], device=draw.device)
            wanted[row] = reference(query[row : row + 1], *world.known[row], last, model.flavour)[0]
    return distance(out, wanted)


def prefill_error(
    model: Model, chunks: list[tuple[int, int]], dtype: torch.dtype, draw: torch.Generator
) -> float:
    world = World(model, [count + position for count, position in chunks], dtype, draw)
    counts = np.array([count for count, _ in chunks])
    ends = np.cumsum(counts)
    table = np.stack([ends - counts, counts, [at for _, at in chunks], np.arange(len(chunks))], 1)
    cut = torch.from_numpy(tiles(table, tile_rows(model.dim, dtype))).to(draw.device)
    query, out = queries(model, int(ends[-1]), dtype, draw)
    prefill(query, world.keys, world.values, world.tables, cut, out, model.flavour)
    wanted = torch.cat([
        reference(
            query[end - count : end], *world.known[number],
            torch.arange(position, position + count, device=draw.device), model.flavour,
        )
        for number, (end, (count, position)) in enumerate(zip(ends.tolist(), chunks, strict=True))
    ])  # fmt: skip
    return distance(out, wanted)


def replayed_error(model: Model, splits: int, dtype: torch.dtype, draw: torch.Generator) -> float:
    """A decode that was captured on one step's tensors, after they were filled with another's."""
    lengths = [700, 33, 1, 0]
    world = World(model, lengths, dtype, draw)
    query, out = queries(model, len(lengths), dtype, draw)
    seen = torch.ones(len(lengths), dtype=torch.int32, device=draw.device)
    tables = torch.zeros_like(world.tables)

    def step() -> None:
        decode(query, world.keys, world.values, tables, seen, out, model.flavour, splits=splits)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    tables.copy_(world.tables)
    seen.copy_(torch.tensor(lengths))
    out.fill_(POISON)
    graph.replay()
    wanted = [
        reference(query[row : row + 1], *world.known[row], seen[row : row + 1] - 1, model.flavour)[0]
        for row in range(len(lengths) - 1)
    ]
    return distance(out, torch.stack([*wanted, torch.zeros_like(wanted[0])]))


def place_error(
    model: Model, tokens: int, turned: int, normed: bool, dtype: torch.dtype, draw: torch.Generator
) -> float:
    heads, kv_heads, dim = model.heads, model.kv_heads, model.dim
    qkv = random(draw, dtype, tokens, (heads + 2 * kv_heads) * dim)
    cosines, sines = (random(draw, dtype, tokens, turned) for _ in range(2))
    weights = random(draw, dtype, dim), random(draw, dtype, dim)
    stores = [
        torch.full((tokens, 2, kv_heads, dim), POISON, dtype=dtype, device=draw.device) for _ in range(2)
    ]
    slots = torch.randperm(2 * tokens, generator=draw, device=draw.device)[:tokens]
    out = torch.full((tokens, heads, dim), POISON, dtype=dtype, device=draw.device)
    norms = (*weights, 1e-6) if normed else None
    elementwise.place(qkv, cosines, sines, norms, heads, kv_heads, stores[0], stores[1], slots, out)
    every = qkv.double().view(tokens, -1, dim)
    parts = [every[:, :heads], every[:, heads : heads + kv_heads], every[:, heads + kv_heads :]]
    for number in range(2):
        if normed:
            parts[number] = functional.rms_norm(parts[number], (dim,), weights[number].double(), 1e-6)
        whole, rest = parts[number][..., :turned], parts[number][..., turned:]
        low, high = whole.chunk(2, -1)
        whole = whole * cosines[:, None] + torch.cat([-high, low], -1) * sines[:, None]
        parts[number] = torch.cat([whole, rest], -1)
    got = [out, *(store.flatten(0, 1)[slots] for store in stores)]
    return distance(torch.cat(got, 1), torch.cat(parts, 1))


def store_error(model: Model, tokens: int, dtype: torch.dtype, draw: torch.Generator) -> float:
    key = random(draw, dtype, model.kv_heads, tokens, model.dim)
    value = random(draw, dtype, tokens, model.kv_heads, model.dim).transpose(0, 1)
    stores = [torch.full((tokens, 2, *key.shape[::2]), POISON, dtype=dtype, device=draw.device) for _ in "kv"]
    slots = torch.randperm(2 * tokens, generator=draw, device=draw.device)[:tokens]
    elementwise.store(key, value, stores[0], stores[1], slots)
    got = torch.stack([store.flatten(0, 1)[slots] for store in stores])
    return distance(got, torch.stack([key, value]).transpose(1, 2).double())


def norm_error(width: int, dtype: torch.dtype, draw: torch.Generator) -> float:
    x, weight = random(draw, dtype, 37, width), random(draw, dtype, width)
    wanted = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    return distance(elementwise.norm(x, weight, 1e-5), wanted)


def gate_error(width: int, name: str, dtype: torch.dtype, draw: torch.Generator) -> float:
    both = random(draw, dtype, 37, 2 * width)
    first, second = both.double().chunk(2, 1)
    acted = functional.silu(first) if name == "silu" else functional.gelu(first, approximate="tanh")
    return distance(elementwise.gate(both, name), acted * second)


def cases() -> Iterator[Case]:
    """All of them, those that need a CUDA device last."""
    for model in MODELS:
        for splits in SPLITS:
            yield Case("decode", f"{model}, {splits} splits",
                       lambda *to, m=model, s=splits: decode_error(m, list(LENGTHS), s, *to))  # fmt: skip
        yield Case("prefill", str(model), lambda *to, m=model: prefill_error(m, list(CHUNKS), *to))
        yield Case("store", str(model), lambda *to, m=model: store_error(m, 50, *to))
        for turned, normed in ((model.dim, False), (model.dim, True), (model.dim // 4 * 2, True)):
            yield Case("place", f"{model}, {turned} turned" + ", normed" * normed,
                       lambda *to, m=model, t=turned, n=normed: place_error(m, 50, t, n, *to))  # fmt: skip
    for width in (1, 100, 4096, 5000, 8192, 20_000):
        yield Case("norm", f"{width} wide", lambda *to, w=width: norm_error(w, *to))
        for name in elementwise.GATES:
            yield Case("gate", f"{name}, {width} wide", lambda *to, w=width, n=name: gate_error(w, n, *to))
    for splits in SPLITS:
        yield Case("decode", f"{LLAMA}, {splits} splits, replayed",
                   lambda *to, s=splits: replayed_error(LLAMA, s, *to))  # fmt: skip
