"""Shapes, stop tokens and first tokens, as configurations and tokenizers state them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.facts import (
    TokenizerFacts,
    bos_token_id,
    pick_template,
    read_shape,
    stop_token_ids,
    token_text,
)
from services.modelstore.core.refusal import Refused
from tests.unit.modelstore.made import LLAMA

DEFAULT_TEMPLATE = {"name": "default", "template": "d"}
SPECIAL = {"<s>": 1, "</s>": 2, "<|im_end|>": 7, "<|eot_id|>": 8}


def tokenizer(**changes):
    values = {"eos_token": "</s>", "special_tokens": SPECIAL, "chat_template": ""} | changes
    return TokenizerFacts(**values)


def test_the_cache_cost_counts_keys_and_values_of_all_layers():
    shape = read_shape("x", LLAMA)
    assert shape.head_dim == 16
    assert shape.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 16 * 2
    assert shape.kv_bytes_per_token("float32") == 2 * shape.kv_bytes_per_token("bfloat16")


def test_a_stated_head_dimension_wins():
    assert read_shape("x", {**LLAMA, "head_dim": 128}).head_dim == 128


def test_without_grouped_heads_every_head_has_its_keys():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read_shape("x", config).kv_heads == 4


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", 1.5, True, 1 << 40])
def test_a_missing_or_impossible_number_names_its_field(key, value):
    with pytest.raises(Refused, match=f"a-model: config.json: {key} is ") as caught:
        read_shape("a-model", {**LLAMA, key: value})
    assert caught.value.reason == "SOURCE_INVALID"


def test_heads_must_share_their_keys_evenly():
    with pytest.raises(Refused, match="no multiple"):
        read_shape("x", {**LLAMA, "num_key_value_heads": 3})


def test_stop_tokens_are_the_union_of_all_that_name_one():
    found = stop_token_ids(
        {"eos_token_id": 3}, {"eos_token_id": [4, 5]}, tokenizer(declared_end_ids=(6,)), vocab_size=300
    )
    assert found == (2, 3, 4, 5, 6)


def test_the_marker_with_which_the_template_ends_a_turn_stops():
    text = "{{ m.content }}<|im_end|>"
    assert stop_token_ids({}, {}, tokenizer(chat_template=text), 300) == (2, 7)


def test_a_marker_that_the_template_does_not_write_does_not_stop():
    assert 8 not in stop_token_ids({}, {}, tokenizer(chat_template="<|im_end|>"), 300)


def test_a_marker_that_is_no_special_token_does_not_stop():
    facts = tokenizer(special_tokens={}, chat_template="<|im_end|>")
    assert stop_token_ids({}, {}, facts, 300) == ()


@given(st.lists(st.integers(-5, 500)))
def test_stop_tokens_are_always_in_the_vocabulary_and_in_order(ids):
    found = stop_token_ids({"eos_token_id": ids}, {}, tokenizer(eos_token=""), vocab_size=100)
    assert list(found) == sorted({i for i in ids if 0 <= i < 100})


@pytest.mark.parametrize(
    ("first", "config", "expected"),
    [
        (1, {}, 1),
        (None, {}, None),
        (1, {"add_bos_token": False}, None),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, 1),
        (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 1),
        (None, {"add_bos_token": True}, None),
        (None, {"bos_token": "<s>"}, None),
        (999, {}, None),
    ],
)
def test_the_first_token_is_the_one_that_the_tokenizer_really_puts_there(first, config, expected):
    assert bos_token_id(tokenizer(first_token_id=first), config, 300) == expected


def test_a_special_tokens_text_is_a_string_or_an_object():
    assert [token_text(v) for v in ("</s>", {"content": "</s>"}, None, 5, {})] == ["</s>", "</s>", "", "", ""]


@pytest.mark.parametrize(
    ("jinja", "config", "expected"),
    [
        ("file", {"chat_template": "config"}, "file"),
        (None, {"chat_template": "config"}, "config"),
        (
            None,
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            "d",
        ),
        (None, {"chat_template": [{"name": "tool_use", "template": "t"}]}, ""),
        (None, {}, ""),
        (None, {"chat_template": None}, ""),
    ],
)
def test_the_chat_template_is_found_where_it_is(jinja, config, expected):
    assert pick_template(jinja, config) == expected
