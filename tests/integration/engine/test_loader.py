"""What happens to a folder that cannot be served: a reason, one line, the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.engine import fused, loader
from services.worker.engine.config import EngineConfig
from services.worker.engine.errors import EngineError
from services.worker.engine.loader import load
from tests.integration.engine.families import build


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
    refusal(folder, "MODEL_LOAD_FAILED")


def test_weights_of_another_shape_are_a_failed_load(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    refusal(folder, "MODEL_LOAD_FAILED")


@pytest.mark.parametrize(("family", "own"), [("qwen3", True), ("mistral", True), ("gemma2", False)])
def test_plain_layers_are_replaced_and_others_kept(tmp_path: Path, family: str, own: bool) -> None:
    model = load(EngineConfig(model_dir=str(build(family, tmp_path)), device="cpu"), lambda *_: None).model
    assert {isinstance(layer, fused.Layer) for layer in model.model.layers} == {own}


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
