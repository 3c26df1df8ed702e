"""The GPU's attention kernels against plain sums in float64, over caches whose other cells are poison."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.attention import Flavour
from services.worker.engine.cuda.decode import SPLITS_MAX, Partials, decode, splits_for
from services.worker.engine.cuda.prefill import prefill, tile_rows, tiles
from tests.unit.worker_engine.interpreter import DEVICE

ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
POISON = float("nan")


def visible(positions, tokens, window):
    """[rows, tokens]: which tokens a query at a position sees."""
    token = torch.arange(tokens)
    seen = token <= positions[:, None]
    return seen & (token > positions[:, None] - window) if window else seen


def attention(query, keys, values, positions, flavour):
    """[rows, heads, dim] over [tokens, kv_heads, dim], in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    scores = torch.einsum("rhd,thd->hrt", query.double(), keys) * flavour.scale
    if flavour.softcap:
        scores = torch.tanh(scores / flavour.softcap) * flavour.softcap
    scores = scores.masked_fill(~visible(positions, keys.shape[0], flavour.window), float("-inf"))
    return torch.einsum("hrt,thd->rhd", torch.softmax(scores, -1), values)


def error(got, wanted):
    return float((got.cpu().double() - wanted).norm() / wanted.norm())


class World:
    """Sequences whose keys and values are known, and a cache that holds them and poison elsewhere."""

    def __init__(self, lengths, *, heads, kv_heads, dim, block_tokens, dtype, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.dim, self.dtype = heads, dim, dtype
        counts = [-(-length // block_tokens) for length in lengths]
        blocks = sum(counts) + 2
        order = torch.randperm(blocks, generator=self.generator).tolist()
        # Cells past a sequence's last block mean nothing: here they lead far out of the cache.
        self.tables = torch.full((len(lengths), max([1, *counts]) + 3), 2**30, dtype=torch.int32)
        sizes = (blocks, block_tokens, kv_heads, dim)
        self.keys, self.values = (torch.full(sizes, POISON, dtype=dtype) for _ in range(2))
        self.known = []
        for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            own, order = order[:count], order[count:]
            self.tables[number, :count] = torch.tensor(own, dtype=torch.int32)
            parts = tuple(self.random(length, kv_heads, dim) for _ in range(2))
            for store, part in zip((self.keys, self.values), parts, strict=True):
                for token in range(length):
                    store[own[token // block_tokens], token % block_tokens] = part[token]
            self.known.append(parts)
        self.keys, self.values, self.tables = (
            part.to(DEVICE) for part in (self.keys, self.values, self.tables)
        )

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def query(self, rows):
        """[rows, heads, dim] as a slice of wider rows, as one product gives queries, keys and values."""
        wide = self.random(rows, self.heads * self.dim + 24)
        return wide.to(DEVICE)[:, : self.heads * self.dim].view(rows, self.heads, self.dim)

    def poison(self, rows):
        return torch.full((rows, self.heads, self.dim), POISON, dtype=self.dtype, device=DEVICE)


def decode_error(world, lengths, flavour, splits, partials=None):
    query, out = world.query(len(lengths)), world.poison(len(lengths))
    seen = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    decode(
        query, world.keys, world.values, world.tables, seen, out, flavour, splits=splits, partials=partials
    )
    wanted = torch.zeros(out.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        if length:
            keys, values = (part[:length] for part in world.known[row])
            wanted[row] = attention(
                query[row : row + 1].cpu(), keys, values, torch.tensor([length - 1]), flavour
            )[0]
    return error(out, wanted)


@pytest.mark.parametrize("dtype", ERROR_MAX)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("window", "softcap"), [(0, 0.0), (40, 0.0), (0, 3.0), (7, 2.0)], ids=["plain", "window", "cap", "both"]
)
def test_decodes_of_very_different_lengths_equal_the_reference(dtype, splits, window, softcap):
    lengths = [1, 0, 150, 16, 17, 65, 0]
    world = World(lengths, heads=6, kv_heads=2, dim=32, block_tokens=16, dtype=dtype, seed=1)
    assert decode_error(world, lengths, Flavour(0.2, window, softcap), splits) < ERROR_MAX[dtype]


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_of_padding_becomes_zeros_and_reads_nothing(splits):
    world = World([5, 5], heads=2, kv_heads=1, dim=8, block_tokens=4, dtype=torch.float32, seed=2)
    world.tables[0] = 2**30
    query, out = world.query(2), world.poison(2)
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    decode(query, world.keys, world.values, world.tables, lengths, out, Flavour(1.0), splits=splits)
    assert not out[0].any()
    assert out[1].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 7, 16, 18]),
    dim=st.sampled_from([8, 16, 24, 80]), block_tokens=st.sampled_from([1, 3, 16, 64]),
    window=st.sampled_from([0, 0, 1, 33]), softcap=st.sampled_from([0.0, 0.0, 2.0]),
    splits=st.sampled_from([1, 2, 5]), dtype=st.sampled_from(list(ERROR_MAX)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_decode_equals_the_reference(
    lengths, kv_heads, group, dim, block_tokens, window, softcap, splits, dtype, seed
):
    world = World(
        lengths, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, block_tokens=block_tokens,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    if any(lengths):
        found = decode_error(world, lengths, Flavour(dim**-0.5, window, softcap), splits)
        assert found < ERROR_MAX[dtype]


@pytest.mark.parametrize("splits", [1, 4])
def test_a_decode_reads_nothing_that_its_window_hides(splits):
    world = World([90], heads=2, kv_heads=1, dim=16, block_tokens=16, dtype=torch.float32, seed=6)
    world.tables[0, :4] = 2**30
    found = decode_error(world, [90], Flavour(0.3, window=26), splits)
    assert found < ERROR_MAX[torch.float32]


def test_a_chunk_reads_nothing_that_its_window_hides():
    world = World([90], heads=2, kv_heads=1, dim=16, block_tokens=16, dtype=torch.float32, seed=6)
    world.tables[0, :2] = 2**30
    # The first of its tokens sees those from 32 on.
    found = prefill_error(world, [(20, 70)], Flavour(0.3, window=39))
    assert found < ERROR_MAX[torch.float32]


def test_scratch_that_was_made_once_serves_calls_of_other_sizes():
    lengths = [70, 3, 40, 9]
    world = World(lengths, heads=4, kv_heads=2, dim=16, block_tokens=16, dtype=torch.float32, seed=3)
    partials = Partials(4, 4, 16, 2, DEVICE)
    partials.sums.fill_(POISON)
    partials.stats.fill_(POISON)
    for rows, splits in ((4, 2), (1, 8), (2, 4)):
        found = decode_error(world, lengths[:rows], Flavour(0.3), splits, partials)
        assert found < ERROR_MAX[torch.float32]
    with pytest.raises(ValueError, match="4 sequences in 4 shares"):
        decode_error(world, lengths, Flavour(0.3), 4, partials)


def test_splits_fill_the_chip_twice_and_no_more():
    assert [splits_for(n, 8, 132) for n in (1, 4, 16, 32, 256)] == [32, 8, 2, 1, 1]
    assert splits_for(1, 1, 10_000) == SPLITS_MAX
    assert splits_for(0, 8, 132) == SPLITS_MAX


def prefill_error(world, chunks, flavour):
    """`chunks`: (rows, position of the first) of each sequence of the world, in a shuffled order of rows."""
    rows = sum(count for count, _ in chunks)
    gap = 3  # rows of other kinds, before and after
    table, first = [], gap
    for number, (count, position) in enumerate(chunks):
        table.append((first, count, position, number))
        first += count
    query, out = world.query(rows + 2 * gap), world.poison(rows + 2 * gap)
    cut = tiles(np.array(table, dtype=np.int64).reshape(-1, 4), tile_rows(world.dim, world.dtype))
    prefill(query, world.keys, world.values, world.tables, torch.from_numpy(cut).to(DEVICE), out, flavour)
    assert out[:gap].isnan().all()
    assert out[gap + rows :].isnan().all()
    wanted = torch.cat([
        attention(
            query[first : first + count].cpu(), *world.known[number],
            torch.arange(position, position + count), flavour,
        )
        for first, count, position, number in table
    ])  # fmt: skip
    return error(out[gap : gap + rows], wanted)


@pytest.mark.parametrize("dtype", ERROR_MAX)
@pytest.mark.parametrize(
    ("window", "softcap"),
    [(0, 0.0), (1, 0.0), (30, 0.0), (90, 0.0), (1000, 0.0), (0, 3.0), (50, 2.0)],
)
def test_chunks_at_any_place_of_their_prompts_equal_the_reference(dtype, window, softcap):
    # The second of the last chunk's tokens is the first that sees a whole tile of keys.
    chunks = [(1, 0), (130, 0), (20, 130), (4, 62)]
    lengths = [count + position for count, position in chunks]
    world = World(lengths, heads=3, kv_heads=1, dim=16, block_tokens=16, dtype=dtype, seed=4)
    assert prefill_error(world, chunks, Flavour(0.25, window, softcap)) < ERROR_MAX[dtype]


@settings(max_examples=20, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 80)), min_size=1, max_size=2),
    kv_heads=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 5, 7]),
    dim=st.sampled_from([8, 16, 24, 80]), block_tokens=st.sampled_from([1, 3, 16, 64]),
    window=st.sampled_from([0, 0, 1, 33, 70]), softcap=st.sampled_from([0.0, 0.0, 2.0]),
    dtype=st.sampled_from(list(ERROR_MAX)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_prefill_equals_the_reference(
    chunks, kv_heads, group, dim, block_tokens, window, softcap, dtype, seed
):
    world = World(
        [count + position for count, position in chunks], heads=group * kv_heads, kv_heads=kv_heads,
        dim=dim, block_tokens=block_tokens, dtype=dtype, seed=seed,
    )  # fmt: skip
    assert prefill_error(world, chunks, Flavour(dim**-0.5, window, softcap)) < ERROR_MAX[dtype]


def test_a_tile_without_rows_writes_nothing():
    world = World([4], heads=1, kv_heads=1, dim=16, block_tokens=4, dtype=torch.float32, seed=5)
    out = world.poison(4)
    empty = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    prefill(world.query(4), world.keys, world.values, world.tables, empty, out, Flavour(1.0))
    prefill(world.query(4), world.keys, world.values, world.tables, empty[:0], out, Flavour(1.0))
    assert out.isnan().all()


@given(
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1000)), max_size=6),
    rows_per_tile=st.sampled_from([1, 16, 64]),
)
def test_tiles_cover_every_row_of_every_chunk_once(chunks, rows_per_tile):
    starts = np.cumsum([0, *(count for count, _ in chunks)])
    table = [(starts[n], count, position, n) for n, (count, position) in enumerate(chunks)]
    cut = tiles(np.array(table, dtype=np.int64).reshape(-1, 4), rows_per_tile)
    assert cut.dtype == np.int32
    assert all(0 < rows <= rows_per_tile for rows in cut[:, 1])
    covered = [
        (first + row, position + row, number)
        for first, rows, position, number in cut.tolist()
        for row in range(rows)
    ]
    assert covered == [
        (first + row, position + row, number)
        for first, count, position, number in table
        for row in range(count)
    ]
