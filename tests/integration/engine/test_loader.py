"""What happens to a folder that cannot be served: a reason, one line, the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.core.plan import Chunk, Limits, Plan
from services.worker.core.sequence import Sequence
from services.worker.engine import fused, loader
from services.worker.engine.config import EngineConfig
from services.worker.engine.cpu.kernels import available
from services.worker.engine.cpu.stack import Stack
from services.worker.engine.errors import EngineError
from services.worker.engine.loader import LoadedModel, load
from services.worker.engine.runner import Runner
from tests.integration.engine.families import build

needs_kernels = pytest.mark.skipif(not available(), reason="no compiled CPU kernels: make kernels")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refusal(folder: Path, reason: str, **settings) -> EngineError:
    with pytest.raises(EngineError) as caught:
        load(EngineConfig(model_dir=str(folder), **{"device": "cpu", **settings}), lambda *_: None)
    assert caught.value.reason == reason, caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def load_cpu(folder: Path, dtype: str) -> LoadedModel:
    config = EngineConfig(model_dir=str(folder), device="cpu", dtype=dtype, kv_cache_bytes=1 << 20)
    return load(config, lambda *_: None)


def prompt_logits(loaded: LoadedModel) -> torch.Tensor:
    """The logits behind a prompt of 40 tokens, in float32."""
    prompt = Sequence("s", [(7 * n) % 200 + 3 for n in range(40)], 40, 10)
    prompt.blocks = [2, 0, 1]
    limits = Limits(
        total_blocks=4, block_tokens=16, sequences_max=2, step_tokens_max=64, context_length=64
    )  # fmt: skip
    runner = Runner(loaded, limits)
    logits = runner.run(runner.prepare(Plan([Chunk(prompt, 0, 40)], 0, 40)))
    assert logits is not None
    return logits.float()


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_unknown_family_is_unsupported_by_name(folder: Path) -> None:
    change_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    error = refusal(folder, "MODEL_UNSUPPORTED")
    assert "MambaForCausalLM" in error.message
    assert error.metadata["architecture"] == "MambaForCausalLM"
    assert "'mamba'" in error.metadata["cause"]


def test_code_in_the_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"})
    load(EngineConfig(model_dir=str(folder), device="cpu"), lambda *_: None)
    assert not witness.exists()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder, "MODEL_LOAD_FAILED").message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path / "nowhere", "MODEL_LOAD_FAILED").message


def test_missing_weights_are_counted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(folder, "MODEL_LOAD_FAILED").message


def test_a_missing_tensor_is_named_rather_than_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder, "MODEL_LOAD_FAILED").message


def test_a_truncated_file_is_a_failed_load(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "file not fully covered" in refusal(folder, "MODEL_LOAD_FAILED").message


def test_weights_of_another_shape_are_a_failed_load(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    message = refusal(folder, "MODEL_LOAD_FAILED").message
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert "96] is wanted" in message


@pytest.mark.parametrize(("family", "own"), [("qwen3", True), ("mistral", True), ("gemma2", False)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)])
def test_plain_layers_are_replaced_and_others_kept(
    monkeypatch, tmp_path: Path, family: str, own: bool, compiled: bool
) -> None:
    monkeypatch.setattr(loader, "available", lambda: compiled)
    layers = load_cpu(build(family, tmp_path), "float32").model.model.layers
    kind = Stack if compiled else fused.Layer
    assert {isinstance(layer, kind) for layer in layers} == {own}
    assert (len(layers) == 1) is (own and compiled)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_kernels_give_the_logits_of_torch_in_bfloat16(monkeypatch, tmp_path: Path, family: str) -> None:
    folder = build(family, tmp_path)
    logits = []
    for compiled in (False, True):
        monkeypatch.setattr(loader, "available", lambda compiled=compiled: compiled)
        logits.append(prompt_logits(load_cpu(folder, "bfloat16")))
    plain, ours = logits
    assert (ours - plain).norm() < 3e-2 * plain.norm()


@needs_kernels
def test_weights_stored_in_bfloat16_stay_so_and_are_multiplied_in_float32(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    tensors = {
        name: part.to(torch.bfloat16) for name, part in load_file(folder / "model.safetensors").items()
    }
    wide = {name: part.float() for name, part in tensors.items()}
    logits = []
    for stored, dtype in ((wide, "float32"), (tensors, "bfloat16")):
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        change_config(folder, dtype=dtype)
        logits.append(prompt_logits(load_cpu(folder, "float32")))
    assert torch.equal(*logits)


def test_an_unknown_device_is_named(folder: Path) -> None:
    assert "'warp'" in refusal(folder, "MODEL_LOAD_FAILED", device="warp").message


def test_a_cache_larger_than_memory_is_refused_with_the_numbers(folder: Path) -> None:
    error = refusal(folder, "MODEL_TOO_LARGE", kv_cache_bytes=1 << 60)
    assert int(error.metadata["needed_bytes"]) > 1 << 60
    assert error.metadata["available_bytes"] in error.message.replace(",", "")


@pytest.mark.parametrize(
    ("asked", "stored", "fast", "wanted"),
    [
        ("float32", "bfloat16", True, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("auto", "float32", True, torch.float32),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "float16", False, torch.float32),
    ],
)
def test_the_dtype_suits_the_processor(monkeypatch, asked, stored, fast, wanted) -> None:
    monkeypatch.setattr(loader, "has_fast_bf16", lambda: fast)
    assert loader._dtype(asked, {"dtype": stored}, torch.device("cpu")) is wanted
