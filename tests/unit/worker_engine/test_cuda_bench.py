"""What is printed of the kernels on a GPU machine, tried at small sizes."""

import argparse

import pytest
import torch

from services.worker.bench import kernel_errors, kernels
from services.worker.bench.kernel_errors import ERROR_MAX, Case, Model
from services.worker.bench.kernel_times import Time
from tests.unit.worker_engine.interpreter import DEVICE

SMALL = Model(3, 1, 8, 4, window=9, softcap=2.0)


@pytest.fixture
def draw():
    return torch.Generator(DEVICE).manual_seed(1)


@pytest.mark.parametrize("dtype", ERROR_MAX)
def test_the_kernels_are_within_their_bounds(dtype, draw):
    errors = [
        kernel_errors.decode_error(SMALL, [5, 0, 17], 1, dtype, draw),
        kernel_errors.decode_error(SMALL, [5, 0, 17], 2, dtype, draw),
        kernel_errors.prefill_error(SMALL, [(3, 0), (20, 7)], dtype, draw),
        kernel_errors.place_error(SMALL, 5, 4, True, dtype, draw),
        kernel_errors.place_error(SMALL, 5, 8, False, dtype, draw),
        kernel_errors.store_error(SMALL, 5, dtype, draw),
        kernel_errors.norm_error(100, dtype, draw),
        kernel_errors.gate_error(100, "gelu_tanh", dtype, draw),
    ]
    assert all(error < ERROR_MAX[dtype] for error in errors), errors


@pytest.mark.parametrize(("found", "good"), [(1e-9, True), (0.1, False), (float("nan"), False)])
def test_an_error_over_its_bound_fails_the_run(found, good, draw, monkeypatch, capsys):
    case = Case("decode", "of something", lambda dtype, _: found if dtype is torch.float16 else 0.0)
    monkeypatch.setattr(kernel_errors, "cases", lambda: [case])
    assert kernels.show_errors(draw) is good
    assert ("!" in capsys.readouterr().out) is not good


def test_a_time_stands_beside_its_floor_and_a_sweep_shows_the_fastest(capsys):
    figures = [Time("decode", "1 x 256", f"tile {n}", n * 1e-6, 3e6, 4e6) for n in range(12, 1, -1)]
    options = argparse.Namespace(sweep=True, bytes_per_s=3e12, flops=8e14)
    kernels.show_times(figures, options)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == kernels.SHOWN_MAX
    assert lines[0].split() == ["decode", "1", "x", "256", "2.0", "1.0", "50%", "1.50", "2.0", "tile", "2"]


def test_a_floor_is_that_of_bytes_or_of_operations():
    time = Time("prefill", "", "", 1.0, bytes=6e12, operations=8e14)
    assert time.floor_s(3e12, 8e14) == pytest.approx(2.0)
    assert time.floor_s(6e12, 1e14) == pytest.approx(8.0)
