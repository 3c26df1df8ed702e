"""Random weights of a configuration: only config.json is read, the rest is as in a model that is loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.worker.bench import shapes
from services.worker.engine import dummy
from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.errors import EngineError
from services.worker.engine.loader import load
from tests.integration.engine.exactness import DEVICE, greedy, open_engine, run
from tests.integration.engine.families import build

CPU = torch.device("cpu")


@pytest.fixture
def bare(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder with a config.json alone."""
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "mistral"])
def test_buffers_that_no_file_holds_are_those_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    made = dummy.build(folder, torch.bfloat16, CPU)
    buffers, wanted = dict(made.named_buffers()), dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in wanted)
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype is wanted[name].dtype, name
        assert torch.equal(buffer, wanted[name]), name
    weights, stored = dict(made.named_parameters()), dict(loaded.named_parameters())
    assert {name: (one.shape, one.dtype) for name, one in weights.items()} == {
        name: (one.shape, one.dtype) for name, one in stored.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_memory_planned_is_that_of_the_same_weights_in_files(tmp_path: Path, tied: bool) -> None:
    folder = build("llama", tmp_path, tie_word_embeddings=tied)
    planned = [
        load(EngineConfig(model_dir=str(folder), device="cpu", load_format=how), lambda *_: None).shape
        for how in ("auto", "dummy")
    ]
    assert planned[0] == planned[1]


def test_a_seed_gives_its_weights_again_and_leaves_others_draws_alone(bare: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        dict(dummy.build(bare, torch.float32, CPU, seed=seed).named_parameters()) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    matrices = [name for name in first if "proj" in name]
    assert matrices
    for name in matrices:
        assert torch.equal(first[name], again[name]), name
        assert not torch.equal(first[name], other[name]), name
        assert 0.2 < first[name].std() < 0.4  # the configuration's initializer_range is 0.3
    assert all(bool((weight == 1).all()) for name, weight in first.items() if "norm" in name)


def test_an_engine_of_random_weights_answers_and_always_the_same(bare: Path) -> None:
    prompt = list(range(3, 40))
    tokens = [
        run(open_engine(bare, load_format="dummy"), [greedy("one", prompt, 12)]).tokens["one"] for _ in "ab"
    ]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 12


def test_no_weights_are_made_up_unless_asked_for(bare: Path) -> None:
    with pytest.raises(EngineError, match=r"no \*\.safetensors"):
        load(EngineConfig(model_dir=str(bare), device="cpu"), lambda *_: None)


def test_the_shapes_are_supported_and_of_the_size_they_claim() -> None:
    with shapes.folder("llama-3-8b") as folder:
        assert dummy.elements(folder) == 8_030_261_248
        assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    assert not folder.exists()
    with shapes.folder("tiny") as folder:
        config = EngineConfig(model_dir=str(folder), device=DEVICE, load_format="dummy")
        ready = Engine(load(config, lambda *_: None), config, time.monotonic_ns).ready()
    assert (ready.vocab_size, ready.context_length) == (512, 1024)


def test_a_configuration_that_makes_no_model_is_named(bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"hidden_size": -1}))
    with pytest.raises(EngineError) as caught:
        load(EngineConfig(model_dir=str(bare), device="cpu", load_format="dummy"), lambda *_: None)
    assert caught.value.reason == "MODEL_LOAD_FAILED"
    assert "hidden size (-1)" in caught.value.message
    assert "\n" not in caught.value.message
