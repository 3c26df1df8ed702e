"""Both paged attentions against one that takes a head and a token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Chunk, Plan
from services.worker.core.sequence import Sequence
from services.worker.engine.attention import Flavour, UnknownArgument, attend
from services.worker.engine.cpu.cache import KernelCache
from services.worker.engine.cpu.kernels import Kernels, available
from services.worker.engine.gathered import GatheredCache
from services.worker.engine.layout import BlockTables, flatten
from services.worker.engine.memory import Shape
from tests.unit.worker_engine import oracles

DIM = 8
BLOCKS = 400
ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

needs_kernels = pytest.mark.skipif(not available(), reason="no compiled CPU kernels: make kernels")
KINDS = ["gathered", pytest.param("kernels", marks=needs_kernels)]


def make_cache(kind, shape, block_tokens, dtype=torch.float32):
    if kind == "gathered":
        return GatheredCache(shape, BLOCKS, block_tokens, dtype, torch.device("cpu"))
    return KernelCache(Kernels(2, beside_openmp=False), shape, BLOCKS, block_tokens, dtype)


def memory(cache):
    """Every tensor of a cache."""
    if isinstance(cache, GatheredCache):
        return [*cache.keys, *cache.values]
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


class World:
    """Sequences whose whole keys and values are known, and a cache that holds what was computed."""

    def __init__(
        self, *, heads: int, kv_heads: int, block_tokens: int, seed: int,
        kind: str = "gathered", dim: int = DIM, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.block_tokens = block_tokens
        self.blocks = list(torch.randperm(BLOCKS, generator=self.generator).tolist())
        self.cache = make_cache(kind, Shape(0, 2, kv_heads, dim, 4, 400, 1), block_tokens, dtype)
        # What other sequences left behind must not be seen.
        for store in memory(self.cache):
            store.copy_(torch.randn(store.shape, generator=self.generator) * 50)
        self.tables = BlockTables(16, BLOCKS)
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def sequence(self, computed: int, pending: int) -> Chunk:
        """A sequence with `computed` tokens in the cache and a chunk of the next `pending`."""
        length = computed + pending
        one = Sequence(f"s{len(self.known)}", [1] * length, length, 100)
        wanted = blocks_for(length, self.block_tokens)
        one.blocks, self.blocks = self.blocks[:wanted], self.blocks[wanted:]
        keys, values = (self.random(length, self.kv_heads, self.dim) for _ in range(2))
        self.known[one.id] = (keys, values)
        one.computed = computed
        if computed:
            self.step([Chunk(one, 0, computed)], 0).attend(
                1, *(part.transpose(0, 1) for part in (
                    self.random(computed, self.heads, self.dim), keys[:computed], values[:computed]
                )), Flavour(1.0),
            )  # fmt: skip
        return Chunk(one, computed, pending)

    def step(self, chunks: list[Chunk], decodes: int):
        return self.cache.begin(flatten(Plan(chunks, decodes, 0), self.tables, self.block_tokens))

    def error(self, decodes: list[int], prompts: list[tuple[int, int]], flavour: Flavour) -> float:
        """The relative error of one step of a layer, over all its tokens."""
        chunks = [self.sequence(length - 1, 1) for length in decodes]
        chunks += [self.sequence(start, count) for start, count in prompts]
        step = self.step(chunks, len(decodes))
        order = sorted(chunks[: len(decodes)], key=lambda chunk: -chunk.start) + chunks[len(decodes) :]
        rows = [(chunk.sequence.id, chunk.start + n) for chunk in order for n in range(chunk.count)]
        query = self.random(len(rows), self.heads, self.dim)
        keys, values = (torch.stack([self.known[name][part][at] for name, at in rows]) for part in (0, 1))
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
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_step_equals_the_oracle(kind, heads, kv_heads, window, softcap):
    world = World(heads=heads, kv_heads=kv_heads, block_tokens=4, seed=1, kind=kind)
    error = world.error([1, 4, 5, 23, 8], [(0, 1), (0, 9), (7, 6), (3, 1)], Flavour(0.4, window, softcap))
    assert error < ERROR_MAX[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_of_very_different_lengths_equal_the_oracle(kind):
    world = World(heads=2, kv_heads=1, block_tokens=1, seed=2, kind=kind)
    assert world.error([90, 1, 2, 60, 3], [], Flavour(0.3)) < ERROR_MAX[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    decodes=st.lists(st.integers(1, 40), max_size=5),
    prompts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=3),
    block_tokens=st.sampled_from([1, 3, 4, 16, 32]),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([8, 16, 20, 48]),
    window=st.sampled_from([0, 0, 1, 7]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_step_equals_the_oracle(
    kind, decodes, prompts, block_tokens, group, kv_heads, dim, window, softcap, dtype, seed
):
    if not decodes and not prompts:
        return
    world = World(
        heads=group * kv_heads, kv_heads=kv_heads, block_tokens=block_tokens, seed=seed,
        kind=kind, dim=dim, dtype=dtype,
    )  # fmt: skip
    assert world.error(decodes, prompts, Flavour(dim**-0.5, window, softcap)) < ERROR_MAX[dtype]


@needs_kernels
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1)])
def test_the_kernels_equal_the_oracle_at_the_sizes_of_real_models(heads, kv_heads, dim):
    world = World(heads=heads, kv_heads=kv_heads, block_tokens=16, seed=7, kind="kernels", dim=dim)
    error = world.error([300, 17], [(130, 70), (0, 33)], Flavour(dim**-0.5))
    assert error < ERROR_MAX[torch.float32]


def test_a_window_reads_only_the_blocks_that_it_covers():
    world = World(heads=1, kv_heads=1, block_tokens=4, seed=3)
    chunk = world.sequence(39, 1)
    step = world.step([chunk], 1)
    assert step._view(0, 6).blocks.tolist() == [chunk.sequence.blocks[-2:]]
    assert step._view(0, 0).blocks.shape == (1, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_window_hides_may_be_anything(kind):
    world = World(heads=2, kv_heads=1, block_tokens=4, seed=9, kind=kind)
    chunk = world.sequence(39, 1)
    for store in memory(world.cache):
        store[chunk.sequence.blocks[:4]] = float("nan")
    query, key, value = (world.random(heads, 1, DIM) for heads in (2, 1, 1))
    out = world.step([chunk], 1).attend(1, query, key, value, Flavour(1.0, window=6))
    assert not out.isnan().any()


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
    step = world.step([world.sequence(0, 1)], 1)
    part = world.random(1, 1, 1, DIM)
    with pytest.raises(UnknownArgument, match="s_aux"):
        attend(torch.nn.Identity(), part, part, part, None, step=step, s_aux=torch.ones(1))
    with pytest.raises(UnknownArgument, match="no step"):
        attend(torch.nn.Identity(), part, part, part, None)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_cache_is_zero_and_aligned(kind):
    cache = make_cache(kind, Shape(0, 1, 1, 16, 2, 8, 1), 16, torch.bfloat16)
    for part in memory(cache):
        assert part.dtype is torch.bfloat16
        assert not part.any()
        assert part.data_ptr() % 64 == 0
        assert part.numel() == BLOCKS * 16 * 16
