"""Arranged layers give the same products."""

import copy

import pytest
import torch
from torch import nn

from services.worker.engine import linear
from services.worker.engine.cpu.kernels import Kernels, available
from services.worker.engine.linear import Packed, Part, Products

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not available(), reason="no compiled CPU kernels: make kernels")


class Attention(nn.Module):
    def __init__(self, bias: bool = False, uneven: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 48, bias=bias)
        self.k_proj = nn.Linear(24, 16, bias=bias or uneven)
        self.v_proj = nn.Linear(24, 16, bias=bias)
        self.o_proj = nn.Linear(48, 24, bias=bias)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q + torch.cat([k, v, k], -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down_proj = nn.Linear(40, 24)

    def forward(self, x):
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, **fields) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(**fields), Mlp()

    def forward(self, x):
        return self.mlp(self.attention(x))


def arrange(model, dtype=torch.float32, kernels=None):
    linear.arrange(model, Products(model, dtype, kernels))


def outputs(model, dtype):
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return [model(torch.randn(1, rows, 24, generator=generator).to(dtype)) for rows in (1, 3, 17, 90)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"bias": True}, {"uneven": True}])
def test_the_results_stay_the_same(dtype, fields):
    torch.manual_seed(0)
    model = Block(**fields).to(dtype).requires_grad_(False)
    before = outputs(model, dtype)
    arrange(model, dtype)
    for now, then in zip(outputs(model, dtype), before, strict=True):
        bound = 1e-5 if dtype is torch.float32 else 3e-2
        assert (now - then).float().norm() <= bound * then.float().norm()


@needs_kernels
@pytest.mark.parametrize("fields", [{}, {"bias": True}, {"uneven": True}])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_kernels_multiply_stored_weights_in_float32(stored, fields):
    torch.manual_seed(0)
    model = Block(**fields).to(stored).requires_grad_(False)
    wanted = outputs(copy.deepcopy(model).float(), torch.float32)
    kernels = Kernels(2, beside_openmp=False)
    arrange(model, torch.float32, kernels)
    for now, then in zip(outputs(model, torch.float32), wanted, strict=True):
        assert (now - then).norm() <= 1e-5 * then.norm()


def test_layers_of_one_input_become_one_product():
    model = Block().requires_grad_(False)
    arrange(model)
    assert isinstance(model.attention.q_proj, Part)
    assert isinstance(model.mlp.up_proj, Part)
    assert isinstance(model.mlp.down_proj, Packed)


def test_layers_that_differ_in_having_a_bias_stay_apart():
    model = Block(uneven=True).requires_grad_(False)
    arrange(model)
    assert not isinstance(model.attention.q_proj, Part)


def test_a_part_never_answers_for_another_input():
    model = Attention().requires_grad_(False)
    weight = model.k_proj.weight.clone()
    arrange(model)
    first, second = torch.randn(1, 2, 24), torch.randn(1, 2, 24)
    with torch.inference_mode():
        model.q_proj(first)
        assert torch.allclose(model.k_proj(second), second @ weight.t(), atol=1e-5)


def test_a_packed_form_that_is_wrong_is_not_used(monkeypatch):
    def wrong(weight, bias):
        return lambda x, onto=None: nn.functional.linear(x, weight, bias) + (x.shape[-2] == 33)

    def missing(weight, bias):
        return torch.ops.no_such_library.no_such_operator(weight)

    for broken in (wrong, missing):
        monkeypatch.setattr(linear, "_mkl", broken)
        chosen = linear._pack_for(CPU, torch.float32, None)
        assert chosen is linear._input_major


def test_a_model_without_linear_layers_is_left_alone():
    model = nn.Sequential(nn.Identity())
    arrange(model)
    assert list(model.children())
