"""Which models are refused, and the cause named."""

import pytest

from services.worker.engine.support import FAMILIES, Unsupported, check_support

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_known_families_pass(family):
    check_support({"model_type": family})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_what_is_known_to_be_right_passes(fields):
    check_support(LLAMA | fields)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"model_type": "mamba"}, "'mamba' is not among gemma, "),
        ({"model_type": None}, "None is not among"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no decoder for text generation"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' depends on the lengths"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic'"),
    ],
)
def test_anything_else_is_refused_by_name(fields, cause):
    with pytest.raises(Unsupported) as caught:
        check_support(LLAMA | fields)
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause
