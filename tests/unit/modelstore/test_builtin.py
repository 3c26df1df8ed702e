"""The built-in model's tokenizer really is bytes."""

import json

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.modelstore.core import builtin

FILES = builtin.sim_files()
TOKENIZER = Tokenizer.from_buffer(FILES["tokenizer.json"])


@given(st.text())
def test_every_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.binary(max_size=64))
def test_ids_are_byte_values(data):
    text = data.decode("utf-8", errors="replace")
    if not any(token in text for token in builtin.special_tokens()):
        assert TOKENIZER.encode(text, add_special_tokens=False).ids == list(text.encode())


def test_special_tokens_follow_the_bytes():
    assert builtin.special_tokens()[builtin.END] == 256
    assert TOKENIZER.encode(builtin.END).ids == [256]
    assert TOKENIZER.get_vocab_size() == json.loads(FILES["config.json"])["vocab_size"]


def test_the_template_makes_turns_that_the_tokenizer_knows():
    messages = [{"role": "user", "content": "hi"}]
    template = jinja2.Environment().from_string(FILES["chat_template.jinja"].decode())
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert set(TOKENIZER.encode(text).ids) >= {256, builtin.special_tokens()["<|user|>"]}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_its_files_are_json(name):
    assert isinstance(json.loads(FILES[name]), dict)


def test_its_facts_agree_with_its_files():
    facts = builtin.sim_facts()
    config = json.loads(FILES["config.json"])
    assert (facts.context_length, facts.vocab_size) == (
        config["max_position_embeddings"],
        config["vocab_size"],
    )
    assert list(facts.stop_token_ids) == json.loads(FILES["generation_config.json"])["eos_token_id"]
