"""Imports over gRPC with the real converter: tiny models built here, and the real one."""

import asyncio
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from safetensors.numpy import load
from tokenizers import Tokenizer

from services.modelstore.app import export_offline
from tests.integration.modelstore import made
from tests.integration.modelstore.conftest import running

REAL = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath(
    "tokenloom", "downloads", "SmolLM2-135M-Instruct.Q4_1.gguf"
)


def as_bfloat16(tensor):
    """Rounded to the nearest, ties to even, as the upper half of a float32."""
    bits = tensor.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_bfloat16(data):
    """Tensors of a safetensors file as their 16 bits; numpy has no bfloat16."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16"
        start, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + start : 8 + length + end], dtype=np.uint16)
        found[name] = raw.reshape(entry["shape"])
    return found


async def test_a_sharded_folder_becomes_one_bfloat16_file_with_everything_a_loader_needs(house):
    weights = made.weights()
    source = made.hf_folder(house.sources / "tiny", weights, shards=3)
    imported, progress = await house.import_model(source, "tiny")
    version = imported.version
    stored = read_bfloat16(await house.file(version, "model.safetensors"))
    assert stored.keys() == weights.keys()
    assert all(np.array_equal(stored[name], as_bfloat16(weights[name])) for name in weights)

    manifest = version.manifest
    count = sum(tensor.size for tensor in weights.values())
    assert (manifest.parameters, manifest.weight_bytes) == (count, 2 * count)
    assert (manifest.architecture, manifest.model_type) == ("LlamaForCausalLM", "llama")
    assert (manifest.dtype, manifest.context_length, manifest.vocab_size) == ("bfloat16", 256, made.VOCAB)
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert list(manifest.stop_token_ids) == [256, 257]
    assert not manifest.HasField("bos_token_id")
    assert (manifest.has_chat_template, manifest.license) == (True, "mit")
    assert {"transformers", "tokenizers"} == set(manifest.checked_with)

    config = json.loads(await house.file(version, "config.json"))
    assert (config["dtype"], "torch_dtype" in config) == ("bfloat16", False)
    generation = json.loads(await house.file(version, "generation_config.json"))
    assert generation == {"eos_token_id": [256, 257], "temperature": 0.6}
    assert await house.file(version, "tokenizer.json") == (source / "tokenizer.json").read_bytes()
    assert await house.file(version, "chat_template.jinja") == (source / "chat_template.jinja").read_bytes()
    assert "chat_template" not in json.loads(await house.file(version, "tokenizer_config.json"))
    stages = list(dict.fromkeys(step.stage for step in progress))
    assert stages == ["read", "convert", "hash", "store"]


@pytest.mark.usefixtures("converting_here")
async def test_the_same_weights_as_gguf_and_as_folder_are_the_same_blob(house):
    weights = made.weights(seed=1)
    folder = made.hf_folder(house.sources / "folder", weights)
    gguf = made.gguf_file(house.sources / "tiny.gguf", weights)
    from_folder, _ = await house.import_model(folder, "folder", dtype="float32")
    from_gguf, _ = await house.import_model(gguf, "gguf", dtype="float32")
    stored = load(await house.file(from_gguf.version, "model.safetensors"))
    assert all(np.array_equal(stored[name], weights[name]) for name in weights)
    digests = [
        {file.path: file.digest for file in imported.version.manifest.files}["model.safetensors"]
        for imported in (from_folder, from_gguf)
    ]
    assert digests[0] == digests[1]

    manifest = from_gguf.version.manifest
    assert manifest.provenance["format"] == "gguf F32"
    assert list(manifest.stop_token_ids) == [256]
    tokenizer = Tokenizer.from_buffer(await house.file(from_gguf.version, "tokenizer.json"))
    text = "ab 12 é<|end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("12").tokens == ["1", "2"]
    assert tokenizer.encode("<|end|>").ids == [256]


async def test_a_source_that_its_own_configuration_rules_out_is_refused(house):
    weights = made.weights()
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    source = made.hf_folder(house.sources / "odd", weights)
    error = await house.refused("SOURCE_INVALID", house.import_model(source, "odd"))
    assert "'model.norm.weight' has shape [31]; its configuration makes it [32]" in error.message
    assert (await house.call("ListModels", pb.ListModelsRequest())).models == []


@pytest.mark.parametrize(
    ("break_it", "reason", "word"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "SOURCE_INVALID", "tokenizer.json"),
        (lambda f: (f / "config.json").unlink(), "SOURCE_INVALID", "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "SOURCE_INVALID", "config.json"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "SOURCE_INVALID",
            "no checkpoint as PyTorch writes it",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "SOURCE_INVALID", "model.safetensors"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({**made.CONFIG, "model_type": "mamba"})),
            "MODEL_UNSUPPORTED",
            "recurrent",
        ),
        (
            lambda f: (f / "config.json").write_text(json.dumps({**made.CONFIG, "auto_map": {"a": "b"}})),
            "MODEL_UNSUPPORTED",
            "trust_remote_code",
        ),
    ],
)
async def test_a_broken_folder_is_refused_before_anything_is_converted(house, break_it, reason, word):
    source = made.hf_folder(house.sources / "broken")
    break_it(source)
    error = await house.refused(reason, house.import_model(source))
    assert error.message.startswith("broken: ")
    assert word in error.message
    assert not (house.store / ".scratch").exists()


async def test_a_truncated_gguf_is_refused_at_every_length(house):
    source = made.gguf_file(house.sources / "cut.gguf")
    for size in (source.stat().st_size - 1, 60_000, 5_000, 100, 10, 3, 0):
        os.truncate(source, size)
        error = await house.refused("SOURCE_INVALID", house.import_model(source))
        assert error.message.startswith("cut.gguf: ")


@pytest.mark.parametrize(
    ("content", "word"), [(b"PK\x03\x04", "pickle"), (b"GGML....", "GGUF"), (b"", "GGUF")]
)
async def test_a_file_of_another_kind_is_refused(house, content, word):
    source = house.sources / "model.pt"
    source.write_bytes(content)
    error = await house.refused("SOURCE_INVALID", house.import_model(source))
    assert word in error.message


@pytest.mark.skipif(not REAL.exists(), reason="`make install` fetches the model")
async def test_the_real_model_is_imported_and_knows_the_capital_of_france(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    async with running(tmp_path / "store", str(REAL.parent)) as house:
        began = time.monotonic()
        imported, _ = await house.import_model(REAL, "smollm2")
        first_s = time.monotonic() - began
        again, _ = await house.import_model(REAL, "smollm2")
        second_s = time.monotonic() - began - first_s
        assert (imported.created, again.created) == (True, False)
        assert again.version == imported.version
        assert second_s < first_s / 2

        manifest = imported.version.manifest
        assert (manifest.context_length, manifest.vocab_size) == (8192, 49152)
        assert (manifest.parameters, manifest.kv_bytes_per_token) == (134_515_008, 23_040)
        assert (list(manifest.stop_token_ids), manifest.license) == ([2], "apache-2.0")

        cut = tmp_path / "store" / "cut.gguf"
        shutil.copyfile(REAL, cut)
    for size in (REAL.stat().st_size - 1, 3_000_000, 1000):
        os.truncate(cut, size)
        async with running(tmp_path / "other", str(cut.parent)) as house:
            await house.refused("SOURCE_INVALID", house.import_model(cut))

    folder = tmp_path / "folder"
    await asyncio.to_thread(export_offline, tmp_path / "store", "smollm2", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert bool(logits.isfinite().all())
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
    # As the model's own tokenizer splits text: digits one by one.
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
