"""What a machine can give to engines, and what a configuration adds to a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters import memory
from services.worker.adapters.engines import kernels_built
from services.worker.adapters.memory import Device, cpu_features, cuda_free_bytes, device_kind, look
from services.worker.adapters.store import with_config
from services.worker.front.ports import ModelVersion
from services.worker.settings import WorkerSettings

MIB = 1 << 20
VERSION = ModelVersion("sha256:" + "a" * 64, "m", 1000, 512)


def settings(**values: Any) -> WorkerSettings:
    return WorkerSettings(name="worker", **values)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, 1,000 and 2,000 MiB free, as far as `nvidia-smi` says."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != "-i" ]; do shift; done\n'
        'case $2 in 0) echo 1000;; 1|GPU-b) echo 2000;; *) echo "No devices were found"; exit 6;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(memory.metadata, "version", lambda name: "2.13.0+cu130")
    return tmp_path


@pytest.mark.parametrize(
    ("device", "visible", "mib"),
    [
        ("auto", None, 1000),
        ("cuda", None, 1000),
        ("cuda:1", None, 2000),
        ("cuda:2", None, 0),
        ("cuda", "1,0", 2000),
        ("cuda:1", "1,0", 1000),
        ("cuda", "GPU-b", 2000),
        ("cuda:1", "1", 0),
        ("auto", "", 0),
        ("auto", "-1", 0),
    ],
)
def test_free_memory_of_a_gpu_is_that_of_the_one_the_engine_will_see(
    gpus: Path, monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, mib: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_free_bytes(device) == mib * MIB


def test_budget_is_a_share_of_what_is_free_where_the_engines_run(gpus: Path) -> None:
    assert look(settings()).budget_bytes == int(1000 * MIB * 0.95)
    assert look(settings()).kind == "cuda"
    host = look(settings(device="cpu"))
    assert host.kind == "cpu"
    free_bytes = memory.available_bytes()
    assert 0.7 * free_bytes < host.budget_bytes < free_bytes
    assert look(settings(engine="sim")).kind == "cpu"
    assert look(settings(memory_bytes=77)).budget_bytes == 77


def test_gpu_that_torch_cannot_use_is_none(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.metadata, "version", lambda name: "2.13.0+cpu")
    assert (device_kind("auto"), device_kind("cuda")) == ("cpu", "cuda")


def test_gpu_that_nobody_can_ask_is_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert look(settings(device="cuda")).budget_bytes == 0


def test_processor_says_what_it_can(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor: 1\nflags: fpu\n")
    assert cpu_features(file) == {"fpu", "avx2", "avx512_bf16"}
    assert Device("cpu", 1, cpu_features(file)).fast_bf16
    assert not Device("cpu", 1, frozenset({"avx2"})).fast_bf16
    assert cpu_features(tmp_path / "none") == frozenset()
    assert not kernels_built(frozenset())


@pytest.mark.parametrize(
    ("config", "hidden_size", "tied"),
    [
        (b'{"hidden_size": 576, "tie_word_embeddings": false}', 576, False),
        (b'{"hidden_size": 576, "tie_word_embeddings": true}', 576, True),
        (b'{"hidden_size": 576}', 576, True),
        (b'{"hidden_size": "x", "tie_word_embeddings": false}', 0, True),
        (b"[]", 0, True),
        (b"\xff{", 0, True),
    ],
)
def test_configuration_that_cannot_be_read_leaves_the_larger_guess(
    config: bytes, hidden_size: int, tied: bool
) -> None:
    found = with_config(VERSION, config)
    assert (found.hidden_size, found.tied) == (hidden_size, tied)
