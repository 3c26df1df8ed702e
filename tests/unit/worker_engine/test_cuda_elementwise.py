"""The GPU's kernels between the products and the attention, each against torch in float64."""

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.cuda.elementwise import gate, norm, place, store
from tests.unit.worker_engine.interpreter import DEVICE

ERROR_MAX = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
POISON = float("nan")
BLOCKS, BLOCK_TOKENS = 9, 4
dtypes = st.sampled_from(list(ERROR_MAX))
seeds = st.integers(0, 10_000)


def random(seed, *shape, dtype=torch.float32, scale=1.0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(dtype).to(DEVICE)


def error(got, wanted):
    """Relative to the norm, or to the least numbers that the dtype still holds in full."""
    least = torch.finfo(got.dtype).smallest_normal * wanted.numel() ** 0.5
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=least))


def cache(kv_heads, dim, dtype):
    sizes = (BLOCKS, BLOCK_TOKENS, kv_heads, dim)
    return tuple(torch.full(sizes, POISON, dtype=dtype, device=DEVICE) for _ in range(2))


def some_slots(tokens, seed):
    """Slots in no order; about a third are those of padding."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(BLOCKS * BLOCK_TOKENS, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.3] = -1
    return slots.to(DEVICE)


def assert_only_these_slots_were_written(stored, slots, wanted):
    """`wanted` [tokens, kv_heads, dim]; all other cells are still poison."""
    rows, real = stored.flatten(0, 1), slots >= 0
    if real.any():
        assert error(rows[slots[real]], wanted[real]) < ERROR_MAX[stored.dtype]
    others = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
    others[slots[real]] = False
    assert rows[others].isnan().all()


def turn(x, cosines, sines):
    turned, rest = x[..., : cosines.shape[-1]], x[..., cosines.shape[-1] :]
    half = turned.shape[-1] // 2
    partner = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cosines.double()[:, None] + partner * sines.double()[:, None], rest], -1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 12), heads=st.integers(1, 9), kv_heads=st.integers(1, 3),
    dim=st.sampled_from([8, 24, 64, 80]), part=st.sampled_from([1, 2, 4]), normed=st.booleans(),
    dtype=dtypes, seed=seeds,
)  # fmt: skip
def test_place_norms_and_rotates_and_writes_each_head_where_it_belongs(
    tokens, heads, kv_heads, dim, part, normed, dtype, seed
):
    wide = random(seed, tokens, (heads + 2 * kv_heads) * dim + 8, dtype=dtype)
    qkv = wide[:, : (heads + 2 * kv_heads) * dim]
    # Both halves differ, as they need not be each other's copies.
    cosines, sines = (random(seed + n, tokens, dim // part, dtype=dtype) for n in (1, 2))
    norms = (random(seed + 3, dim, dtype=dtype), random(seed + 4, dim, dtype=dtype), 1e-5) if normed else None
    slots, (keys, values) = some_slots(tokens, seed), cache(kv_heads, dim, dtype)
    out = torch.full((tokens, heads, dim), POISON, dtype=dtype, device=DEVICE)
    place(qkv, cosines, sines, norms, heads, kv_heads, keys, values, slots, out)

    query, key, value = qkv.double().view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        query = functional.rms_norm(query, (dim,), norms[0].double(), norms[2])
        key = functional.rms_norm(key, (dim,), norms[1].double(), norms[2])
    real = slots >= 0
    if real.any():
        assert error(out[real], turn(query, cosines, sines)[real]) < ERROR_MAX[dtype]
    assert out[~real].isnan().all()
    assert_only_these_slots_were_written(keys, slots, turn(key, cosines, sines))
    assert_only_these_slots_were_written(values, slots, value)


@pytest.mark.parametrize("dtype", ERROR_MAX)
@pytest.mark.parametrize(("kv_heads", "tokens", "dim"), [(1, 1, 8), (3, 7, 20), (8, 2, 128), (20, 3, 256)])
def test_store_takes_any_strides(kv_heads, tokens, dim, dtype):
    key = random(1, kv_heads, tokens, dim, dtype=dtype)
    value = random(2, tokens, dim, kv_heads, dtype=dtype).permute(2, 0, 1)
    slots, (keys, values) = some_slots(tokens, 3), cache(kv_heads, dim, dtype)
    store(key, value, keys, values, slots)
    assert_only_these_slots_were_written(keys, slots, key.transpose(0, 1).double())
    assert_only_these_slots_were_written(values, slots, value.transpose(0, 1).double())


@pytest.mark.parametrize("dtype", ERROR_MAX)
@pytest.mark.parametrize("width", [1, 7, 64, 600, 4096, 8192, 8200, 20_000])
def test_norm_of_any_width(width, dtype):
    x = random(width, 3, width + 5, dtype=dtype, scale=4.0)[:, :width]
    weight = random(width + 1, width, dtype=dtype)
    wanted = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert error(norm(x, weight, 1e-5), wanted) < ERROR_MAX[dtype]


def test_norm_of_zeros_is_zeros():
    zeros = torch.zeros(2, 30, device=DEVICE)
    assert torch.equal(norm(zeros, torch.ones(30, device=DEVICE), 1e-6), zeros)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4), width=st.integers(1, 2100), dtype=dtypes,
    name=st.sampled_from(["silu", "gelu_tanh"]), scale=st.sampled_from([0.01, 1.0, 30.0]), seed=seeds,
)  # fmt: skip
def test_gate_of_any_width(rows, width, dtype, name, scale, seed):
    both = random(seed, rows, 2 * width, dtype=dtype, scale=scale)
    first, second = both[:, :width].double(), both[:, width:].double()
    acted = functional.silu(first) if name == "silu" else functional.gelu(first, approximate="tanh")
    assert error(gate(both, name), acted * second) < ERROR_MAX[dtype]


def test_no_tokens_are_no_work():
    nothing = torch.empty(0, 64, device=DEVICE)
    keys, values = cache(1, 16, torch.float32)
    slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert norm(nothing, nothing.new_ones(64), 1e-6).shape == (0, 64)
    assert gate(nothing, "silu").shape == (0, 32)
    turns = nothing[:, :16]
    place(nothing, turns, turns, None, 2, 1, keys, values, slots, nothing.view(0, 2, 32)[:, :, :16])
    store(nothing.view(1, 0, 64), nothing.view(1, 0, 64), keys, values, slots)
    assert keys.isnan().all()
