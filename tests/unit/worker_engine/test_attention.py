"""The paged, padded, fused attention against one that takes a head and a token at a time."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.blocks import blocks_for
from services.worker.core.scheduler import Chunk, Plan
from services.worker.core.sequence import Sequence
from services.worker.engine.attention import Flavour, KvCache, StepContext, UnknownArgument, attend
from services.worker.engine.layout import BlockTables, flatten
from services.worker.engine.memory import Shape
from tests.unit.worker_engine import oracles

DIM = 8
ERROR_MAX = 1e-5


class World:
    """Sequences whose whole keys and values are known, and a cache that holds what was computed."""

    def __init__(self, *, heads: int, kv_heads: int, block_tokens: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.block_tokens = heads, kv_heads, block_tokens
        self.blocks = list(torch.randperm(400, generator=self.generator).tolist())
        shape = Shape(0, 2, kv_heads, DIM, 4, 400, 1)
        self.cache = KvCache(shape, 400, block_tokens, torch.float32, torch.device("cpu"))
        # What other sequences left behind must not be seen.
        for store in itertools.chain(self.cache.keys, self.cache.values):
            store.copy_(torch.randn(store.shape, generator=self.generator) * 50)
        self.tables = BlockTables(16, 400)
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def sequence(self, computed: int, pending: int) -> Chunk:
        """A sequence with `computed` tokens in the cache and a chunk of the next `pending`."""
        length = computed + pending
        one = Sequence(f"s{len(self.known)}", [1] * length, length, 100)
        wanted = blocks_for(length, self.block_tokens)
        one.blocks, self.blocks = self.blocks[:wanted], self.blocks[wanted:]
        keys, values = self.random(length, self.kv_heads, DIM), self.random(length, self.kv_heads, DIM)
        self.known[one.id] = (keys, values)
        one.computed = computed
        slots = [one.blocks[t // self.block_tokens] * self.block_tokens + t % self.block_tokens
                 for t in range(computed)]  # fmt: skip
        if slots:
            self.cache.write(1, torch.tensor(slots), keys[:computed], values[:computed])
        return Chunk(one, computed, pending)

    def error(self, decodes: list[int], prompts: list[tuple[int, int]], flavour: Flavour) -> float:
        """The relative error of one step of a layer, over all its tokens."""
        chunks = [self.sequence(length - 1, 1) for length in decodes]
        chunks += [self.sequence(start, count) for start, count in prompts]
        flat = flatten(Plan(chunks, len(decodes), 0), self.tables, self.block_tokens)
        order = sorted(chunks[: len(decodes)], key=lambda chunk: -chunk.start) + chunks[len(decodes) :]
        rows = [(chunk.sequence.id, chunk.start + n) for chunk in order for n in range(chunk.count)]
        query = self.random(len(rows), self.heads, DIM)
        keys, values = (torch.stack([self.known[name][part][at] for name, at in rows]) for part in (0, 1))
        step = StepContext(self.cache, torch.from_numpy(flat.slots), flat.spans)
        out = step.attend(1, *(part.transpose(0, 1) for part in (query, keys, values)), flavour)
        wanted = torch.stack([
            oracles.attention(query[row], self.known[name][0][: at + 1], self.known[name][1][: at + 1],
                              flavour.scale, flavour.window, flavour.softcap)
            for row, (name, at) in enumerate(rows)
        ])  # fmt: skip
        return float((out.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 5, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (4, 1)])
def test_a_mixed_step_equals_the_oracle(heads, kv_heads, window, softcap):
    world = World(heads=heads, kv_heads=kv_heads, block_tokens=4, seed=1)
    error = world.error([1, 4, 5, 23, 8], [(0, 1), (0, 9), (7, 6), (3, 1)], Flavour(0.4, window, softcap))
    assert error < ERROR_MAX


def test_decodes_of_very_different_lengths_equal_the_oracle():
    world = World(heads=2, kv_heads=1, block_tokens=1, seed=2)
    assert world.error([90, 1, 2, 60, 3], [], Flavour(0.3)) < ERROR_MAX


@settings(max_examples=40, deadline=None)
@given(
    decodes=st.lists(st.integers(1, 40), max_size=5),
    prompts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=3),
    block_tokens=st.sampled_from([1, 3, 4, 16]),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    window=st.sampled_from([0, 0, 1, 7]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_step_equals_the_oracle(decodes, prompts, block_tokens, group, kv_heads, window, softcap, seed):
    if not decodes and not prompts:
        return
    world = World(heads=group * kv_heads, kv_heads=kv_heads, block_tokens=block_tokens, seed=seed)
    assert world.error(decodes, prompts, Flavour(0.4, window, softcap)) < ERROR_MAX


def test_a_window_reads_only_the_blocks_that_it_covers():
    world = World(heads=1, kv_heads=1, block_tokens=4, seed=3)
    chunk = world.sequence(39, 1)
    flat = flatten(Plan([chunk], 1, 1), world.tables, 4)
    step = StepContext(world.cache, torch.from_numpy(flat.slots), flat.spans)
    assert step._view(0, 6).blocks.tolist() == [chunk.sequence.blocks[-2:]]
    assert step._view(0, 0).blocks.shape == (1, 10)


def test_keys_and_values_lie_where_the_slots_say():
    world = World(heads=1, kv_heads=2, block_tokens=4, seed=4)
    chunk = world.sequence(0, 6)
    flat = flatten(Plan([chunk], 0, 6), world.tables, 4)
    keys, values = world.known[chunk.sequence.id]
    world.cache.write(0, torch.from_numpy(flat.slots), keys, values)
    got_keys, got_values = world.cache.read(0, torch.tensor([chunk.sequence.blocks]))
    assert torch.equal(got_keys[0, :, :6].transpose(0, 1), keys)
    assert torch.equal(got_values[0, :, :6].transpose(0, 1), values)


def test_an_argument_that_is_not_known_is_refused_by_name():
    world = World(heads=1, kv_heads=1, block_tokens=4, seed=5)
    step = StepContext(world.cache, torch.zeros(1, dtype=torch.int64), [])
    part = world.random(1, 1, 1, DIM)
    with pytest.raises(UnknownArgument, match="s_aux"):
        attend(torch.nn.Identity(), part, part, part, None, step=step, s_aux=torch.ones(1))
    with pytest.raises(UnknownArgument, match="no step"):
        attend(torch.nn.Identity(), part, part, part, None)


def test_memory_of_the_cache_is_zero_and_aligned():
    cache = World(heads=1, kv_heads=1, block_tokens=4, seed=6)
    fresh = KvCache(Shape(0, 1, 1, DIM, 2, 8, 1), 3, 4, torch.bfloat16, torch.device("cpu"))
    assert fresh.keys[0].shape == (3, 4, 1, DIM)
    assert fresh.keys[0].dtype is torch.bfloat16
    assert not fresh.keys[0].any()
    assert cache.cache.keys[0].data_ptr() % 64 == 0
    assert np.prod(cache.cache.keys[0].shape) == 400 * 4 * DIM
