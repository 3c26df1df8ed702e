"""The CPU kernels between the products, each against torch in float64."""

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.cpu.kernels import Kernels, Layer, available, padded

pytestmark = pytest.mark.skipif(not available(), reason="no compiled CPU kernels: make kernels")

BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 10_000)


@pytest.fixture(scope="module", params=[1, 2, 5])
def kernels(request):
    return Kernels(request.param, beside_openmp=False)


def random(seed, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-20))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 300), inputs=st.integers(1, 700), outputs=st.integers(1, 200),
       stored=dtypes, biased=st.booleans(), added=st.booleans(), seed=seeds)  # fmt: skip
def test_a_product_of_any_size(kernels, rows, inputs, outputs, stored, biased, added, seed):
    x, weight = random(seed, rows, inputs), random(seed + 1, outputs, inputs, dtype=stored)
    bias = random(seed + 2, outputs) if biased else None
    onto = random(seed + 3, rows, outputs) if added else None
    wanted = x.double() @ weight.double().t()
    wanted = wanted + (0 if bias is None else bias.double()) + (0 if onto is None else onto.double())
    packed = kernels.pack(weight)
    assert packed.narrow is (stored is torch.bfloat16)
    # Terms may cancel: the error is measured against what was added up.
    size = (x.double().abs() @ weight.double().abs().t()).norm()
    assert (kernels.linear(x, packed, bias, onto).double() - wanted).norm() <= 1e-6 * (size + wanted.norm())


def test_a_float32_weight_of_bfloat16_numbers_is_held_in_half_the_bytes(kernels):
    weight = random(0, 64, 48, dtype=torch.bfloat16)
    wide, narrow = kernels.pack(weight.float()), kernels.pack(weight)
    assert wide.narrow
    assert torch.equal(wide.words, narrow.words)


def test_a_product_refuses_what_does_not_fit(kernels):
    packed = kernels.pack(random(0, 8, 16))
    for x, onto in ((random(0, 2, 15), None), (random(0, 2, 16, dtype=torch.bfloat16), None),
                    (random(0, 2, 16), random(0, 3, 8))):  # fmt: skip
        with pytest.raises(ValueError, match="product"):
            kernels.linear(x, packed, None, onto)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 400), width=st.integers(1, 600), dtype=dtypes, seed=seeds)
def test_norm(kernels, rows, width, dtype, seed):
    x, weight = random(seed, rows, width, dtype=dtype), random(seed + 1, width, dtype=dtype)
    wanted = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert error(kernels.norm(x, weight, 1e-5), wanted) < BOUND[dtype]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), width=st.integers(1, 300), dtype=dtypes, seed=seeds,
       gate=st.sampled_from(["silu", "gelu_tanh"]),
       scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]))  # fmt: skip
def test_gate(kernels, rows, width, dtype, seed, gate, scale):
    both = random(seed, rows, 2 * width, dtype=dtype, scale=scale)
    first, second = both[:, :width].double(), both[:, width:].double()
    acted = functional.silu(first) if gate == "silu" else functional.gelu(first, approximate="tanh")
    assert error(kernels.gate(both, gate), acted * second) < BOUND[dtype]


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 60), heads=st.integers(1, 4), kv_heads=st.integers(1, 3),
       dim=st.sampled_from([8, 16, 40, 64]), part=st.sampled_from([1, 2]),
       block_tokens=st.sampled_from([1, 4, 16]), normed=st.booleans(), dtype=dtypes, seed=seeds)  # fmt: skip
def test_place_norms_rotates_and_stores(
    kernels, tokens, heads, kv_heads, dim, part, block_tokens, normed, dtype, seed
):
    turned = dim // part
    qkv = random(seed, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = random(seed + 1, tokens, turned // 2).repeat(1, 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (random(seed + 2, dim, dtype=dtype), random(seed + 3, dim, dtype=dtype), 1e-6) if normed else None
    blocks = 70
    layer = Layer(
        torch.zeros(blocks, kv_heads, dim, padded(block_tokens), dtype=dtype),
        torch.zeros(blocks, kv_heads, block_tokens, padded(dim), dtype=dtype),
        block_tokens,
        dim,
    )
    slots = torch.randperm(blocks * block_tokens, generator=torch.Generator().manual_seed(seed))[:tokens]
    wanted = qkv.double()
    query, key, value = wanted.split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        query = functional.rms_norm(query, (dim,), norms[0].double(), 1e-6)
        key = functional.rms_norm(key, (dim,), norms[1].double(), 1e-6)
    query, key = (_turn(x, cosines, sines) for x in (query, key))
    kernels.place(qkv, cosines, sines, norms, slots, heads, layer)
    assert error(qkv[:, :heads], query) < BOUND[dtype]
    block, offset = slots // block_tokens, slots % block_tokens
    assert error(layer.keys[block, :, :, offset], key) < BOUND[dtype]
    assert error(layer.values[block, :, offset, :dim], value) < BOUND[dtype]
    untouched = blocks * block_tokens * kv_heads * dim - tokens * kv_heads * dim
    assert int((layer.values == 0).sum()) >= untouched


def _turn(x, cosines, sines):
    turned, rest = x[..., : cosines.shape[-1]], x[..., cosines.shape[-1] :]
    half = turned.shape[-1] // 2
    partner = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cosines.double()[:, None] + partner * sines.double()[:, None], rest], -1)


def test_many_small_jobs_of_one_pool_each_end_whole():
    pool = Kernels(4, beside_openmp=False)
    packed = pool.pack(torch.eye(96))
    for number in range(3000):
        x = torch.full((1 + number % 7, 96), float(number))
        assert torch.equal(pool.linear(x, packed, None), x)


def test_the_team_of_openmp_gives_the_same():
    x, weight = random(1, 50, 64), random(2, 500, 64)
    own, borrowed = (Kernels(2, beside_openmp=beside) for beside in (False, True))
    assert torch.equal(own.linear(x, own.pack(weight), None), borrowed.linear(x, borrowed.pack(weight), None))


def test_time_is_kept_account_of_by_kind_of_work():
    pool = Kernels(2, beside_openmp=False)
    assert set(pool.spent_ns().values()) == {0}
    pool.linear(random(0, 3, 8), pool.pack(random(1, 4, 8)), None)
    spent = pool.spent_ns()
    assert spent["single products"] > 0
    assert spent["products"] == 0
