"""Which configurations are accepted, and what the others are told."""

import pytest

from services.modelstore.core.refusal import Refused
from services.modelstore.core.support import (
    CAUSES,
    FAMILIES,
    GGUF_FAMILIES,
    REARRANGED,
    check_config,
    check_gguf_architecture,
    check_tokenizer_config,
)
from services.worker.engine import support as engine_support
from tests.unit.modelstore.made import LLAMA


def cause(**changes):
    with pytest.raises(Refused) as caught:
        check_config("a-model", {**LLAMA, **changes})
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    assert caught.value.message.startswith("a-model: ")
    assert "\n" not in caught.value.message
    return caught.value.metadata["cause"]


@pytest.mark.parametrize(("model_type", "architecture"), FAMILIES.items())
def test_a_family_of_the_table_is_accepted(model_type, architecture):
    check_config("x", {**LLAMA, "model_type": model_type, "architectures": [architecture]})


def test_the_engine_runs_every_family_that_is_imported():
    assert set(FAMILIES) <= engine_support.FAMILIES
    assert set(GGUF_FAMILIES.values()) | REARRANGED <= set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(CAUSES))
def test_a_known_other_family_is_refused_with_its_cause(model_type):
    assert model_type not in FAMILIES
    assert cause(model_type=model_type, architectures=["X"]) == CAUSES[model_type]


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("mamba", "recurrent"),
        ("jamba", "convolutional"),
        ("t5", "encoder-decoder"),
        ("bert", "encoder"),
        ("gpt2", "rotary"),
        ("deepseek_v3", "latent"),
        ("llava", "images"),
        ("gpt_oss", "sinks"),
    ],
)
def test_causes_say_what_it_is(model_type, word):
    assert word in cause(model_type=model_type)


def test_an_unknown_family_is_told_which_are_known():
    assert "llama, mistral" in cause(model_type="brand-new", architectures=["BrandNewForCausalLM"])


def test_a_family_is_served_as_its_causal_language_model_only():
    assert "only LlamaForCausalLM" in cause(architectures=["LlamaForSequenceClassification"])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "trust_remote_code"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"use_bidirectional_attention": True}, "not causal"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "'longrope'"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_what_would_be_wrong_without_an_error_is_refused(changes, word):
    assert word in cause(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": {}}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"architectures": []},
        {"architectures": None},
    ],
)
def test_fixed_frequencies_and_attention_layers_are_accepted(changes):
    check_config("x", {**LLAMA, **changes})


def test_a_configuration_without_a_type_is_refused():
    assert "no model_type" in cause(model_type="")


def test_gguf_architectures_are_mapped_or_refused():
    assert check_gguf_architecture("x", "qwen2") == "qwen2"
    for architecture, word in (
        ("mamba", "recurrent"),
        ("gemma3", "import"),
        ("brand-new", "Hugging Face folder"),
    ):
        with pytest.raises(Refused, match=word) as caught:
            check_gguf_architecture("x", architecture)
        assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_a_tokenizer_that_is_code_is_refused():
    check_tokenizer_config("x", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(Refused, match="trust_remote_code"):
        check_tokenizer_config("x", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
