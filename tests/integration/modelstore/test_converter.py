"""The converter's parts in this process: shards, casts, checks against the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from services.modelstore.converter import convert, weights
from services.modelstore.converter.shards import ShardWriter
from services.modelstore.core import builtin
from services.modelstore.core.ports import ConversionJob
from services.modelstore.core.refusal import Refused
from tests.integration.modelstore import made

SMALL = {
    "vocab_size": made.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": None,
}


def run(source, tmp_path, dtype="float32", shard_bytes_max=1 << 30):
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    job = ConversionJob("folder", "m", str(source), str(output), dtype, shard_bytes_max, 0, "", {})
    return convert.run(job, lambda *_: None), output


def refusal(source, tmp_path, **job):
    with pytest.raises(Refused) as caught:
        run(source, tmp_path, **job)
    assert caught.value.reason == "SOURCE_INVALID"
    return caught.value.message


def saved(tmp_path, config):
    """A folder as transformers writes it, with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(builtin.sim_files()[name])
    return folder, model


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, tie_word_embeddings=False),
        Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_what_transformers_saved_loads_again_from_the_store_with_equal_logits(tmp_path, config):
    folder, model = saved(tmp_path, config)
    converted, output = run(folder, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.randint(0, made.VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert converted.facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert converted.facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert converted.facts["stop_token_ids"] == [256]


def test_a_missing_expert_is_found_by_loading(tmp_path):
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    folder, _ = saved(tmp_path, config)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts" not in name and "gate" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "has no tensor" in refusal(folder, tmp_path)


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path):
    tensors = made.weights()
    del tensors["model.norm.weight"]
    message = refusal(made.hf_folder(tmp_path / "missing", tensors), tmp_path)
    assert message == "m: has no tensor 'model.norm.weight', which its configuration asks for"
    tensors = made.weights() | {"model.extra.weight": made.weights()["model.norm.weight"]}
    assert "'model.extra.weight'" in refusal(made.hf_folder(tmp_path / "extra", tensors), tmp_path)


def test_tables_that_are_computed_and_tied_tensors_are_dropped(tmp_path):
    tensors = made.weights()
    norm = tensors["model.norm.weight"]
    tensors |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": norm,
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    _, output = run(made.hf_folder(tmp_path / "old", tensors), tmp_path)
    assert set(load_file(output / "model.safetensors")) == set(made.weights())


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    tensors = made.weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0 + 1e5
    source = made.hf_folder(tmp_path / "large", tensors)
    assert "import it as bfloat16" in refusal(source, tmp_path, dtype="float16")
    run(source, tmp_path, dtype="bfloat16")


def test_quantised_tensors_are_refused(tmp_path):
    source = made.hf_folder(tmp_path / "packed")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")
    assert "not quantised" in refusal(source, tmp_path)


def test_large_weights_are_split_and_indexed(tmp_path):
    source = made.hf_folder(tmp_path / "folder")
    converted, output = run(source, tmp_path, shard_bytes_max=20_000)
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 60_000 for path in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(made.weights())
    assert set(converted.files) == {path.name for path in output.iterdir()}
    AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


def test_a_conversion_gives_the_same_bytes_every_time(tmp_path):
    source = made.hf_folder(tmp_path / "folder")
    found = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        _, output = run(source, tmp_path / attempt, dtype="bfloat16", shard_bytes_max=20_000)
        found.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert found[0] == found[1]


def test_a_source_without_end_token_gets_none_from_the_classes_defaults(tmp_path):
    config = {key: value for key, value in made.CONFIG.items() if key != "eos_token_id"}
    source = made.hf_folder(tmp_path / "folder")
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    converted, _ = run(source, tmp_path)
    # LlamaConfig's own default is 2, which is a byte here; the tokenizer says 256.
    assert converted.facts["stop_token_ids"] == [256]


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    source = made.hf_folder(tmp_path / "folder")
    (source / "tokenizer.json").write_text('{"model": {}}')
    assert "tokenizer.json is not readable" in refusal(source, tmp_path)


def test_a_model_without_a_chat_template_is_converted_and_says_so(tmp_path):
    source = made.hf_folder(tmp_path / "folder")
    (source / "chat_template.jinja").unlink()
    converted, output = run(source, tmp_path)
    assert converted.facts["has_chat_template"] is False
    assert not (output / "chat_template.jinja").exists()


def test_a_tokenizer_of_a_larger_vocabulary_is_refused_before_any_weights_are_read(tmp_path):
    source = made.hf_folder(tmp_path / "folder", vocab_size=200)
    message = refusal(source, tmp_path)
    assert message.startswith("m: the tokenizer has token '")
    assert message.endswith(
        "' with id 255, and the model's vocabulary ends at 199; use the tokenizer that belongs to the model"
    )


def test_a_special_token_beyond_the_vocabulary_is_left_to_whoever_asks_for_it(tmp_path):
    tensors = made.weights()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:258]
    source = made.hf_folder(tmp_path / "folder", tensors, vocab_size=258)
    converted, _ = run(source, tmp_path)
    assert converted.facts["vocab_size"] == 258


def test_a_configuration_of_a_later_transformers_is_refused(tmp_path):
    source = made.hf_folder(tmp_path / "folder", transformers_version="99.0.0")
    with pytest.raises(Refused, match=r"was written by transformers 99\.0\.0"):
        run(source, tmp_path)


def test_shapes_are_checked_before_anything_is_cast(tmp_path):
    tensors = made.weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    source = made.hf_folder(tmp_path / "folder", tensors)
    assert refusal(source, tmp_path) == (
        "m: tensor 'model.norm.weight' has shape [31]; its configuration makes it [32]"
    )
    assert not list((tmp_path / "output").iterdir())


def test_tied_tensors_that_differ_are_refused(tmp_path):
    tensors = made.weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    assert "one tensor, and the files hold two different ones" in refusal(
        made.hf_folder(tmp_path / "odd", tensors), tmp_path
    )


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes_max=10)
    for name in ("a", "b"):
        writer.add(name, torch.zeros(100))
    assert writer.finish() == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (writer.elements, writer.size_bytes) == (200, 800)


def test_a_model_is_laid_out_without_being_allocated():
    expected = weights.expect(AutoConfig.for_model("llama", **{**SMALL, "tie_word_embeddings": True}))
    assert expected.shapes["model.norm.weight"] == (32,)
    assert expected.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert all(p.device.type == "meta" for p in expected.model.parameters())
