"""A version's files as text: prompts to ids, ids to text, and what is wrong with broken files."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.gateway.adapters.model_text import TextLimits, TokenizerText
from services.gateway.core.detokenise import ByteDetokeniser, WindowDetokeniser
from services.gateway.core.refusal import Refusal
from services.gateway.core.request import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from tests.unit.gateway.made import CHAT_TEMPLATE, byte_fallback, byte_level, files_of, version

CHAT = ChatPrompt((ChatMessage("user", "Paris"),))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as made:
        yield made


def text_of(files, pool, inline_chars=1000, rendered_chars_max=10_000, **facts):
    return TokenizerText(version(**facts), files, TextLimits(inline_chars, rendered_chars_max), pool)


async def test_plain_text_becomes_its_tokens(pool):
    text = text_of(files_of(byte_level()), pool)
    assert await text.encode(TextPrompt("Paris")) == tuple(byte_level().encode("Paris").ids)


async def test_token_ids_are_taken_as_they_are(pool):
    assert await text_of(files_of(byte_level()), pool).encode(TokenPrompt((5, 4))) == (5, 4)


async def test_a_long_prompt_is_tokenised_in_the_pool_with_the_same_result(pool):
    text = text_of(files_of(byte_level()), pool, inline_chars=4, context_length=4096)
    long = "Paris is the capital of France. " * 50
    assert await text.encode(TextPrompt(long)) == tuple(byte_level().encode(long).ids)


async def test_a_prompt_far_beyond_the_context_is_refused_without_being_read_to_its_end(pool):
    text = text_of(files_of(byte_level()), pool, context_length=64)
    with pytest.raises(Refusal, match="more tokens than this model's context of 64") as refused:
        await text.encode(TextPrompt("Paris is " * 100_000))
    assert refused.value.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_long_text_of_few_tokens_is_read_to_its_end(pool):
    tokenizer = byte_level()
    tokenizer.add_tokens(["x" * 500])
    ids = await text_of(files_of(tokenizer), pool, context_length=64).encode(TextPrompt("x" * 500 * 40))
    assert len(ids) == 40


async def test_a_chat_goes_through_the_template_and_its_markers_are_tokens(pool):
    text = text_of(files_of(byte_level(), {"chat_template": CHAT_TEMPLATE}), pool)
    ids = await text.encode(CHAT)
    assert byte_level().decode(list(ids), skip_special_tokens=False) == (
        "<|im_start|>user\nParis<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == byte_level().token_to_id("<|im_start|>")


async def test_a_name_reaches_the_template_only_when_it_is_given(pool):
    source = "{% for m in messages %}{{ m.name if m.name is defined else '-' }}{% endfor %}"
    text = text_of(files_of(byte_level(), {"chat_template": source}), pool)
    messages = (ChatMessage("user", "x", "ann"), ChatMessage("user", "x"))
    assert text.render(ChatPrompt(messages)) == "ann-"


async def test_a_model_without_a_template_says_so(pool):
    text = text_of(files_of(byte_level()), pool)
    with pytest.raises(Refusal) as refused:
        await text.encode(CHAT)
    assert refused.value.reason == "CHAT_TEMPLATE_MISSING"
    assert refused.value.message == (
        "model 'tiny' has no chat template, so messages cannot be made into its prompt: "
        "use Generate with a prompt (gRPC) or /v1/completions (HTTP)"
    )


async def test_a_template_that_refuses_says_why(pool):
    text = text_of(files_of(byte_level(), {"chat_template": "{{ raise_exception('no users') }}"}), pool)
    with pytest.raises(Refusal, match="no users") as refused:
        await text.encode(CHAT)
    assert refused.value.reason == "CHAT_TEMPLATE_FAILED"


def test_a_broken_template_does_not_keep_plain_prompts_from_working(pool):
    text = text_of(files_of(byte_level(), {"chat_template": "{% for %}"}), pool)
    with pytest.raises(Refusal, match="is broken"):
        text.render(CHAT)


async def test_bos_is_added_to_plain_prompts_and_never_twice(pool):
    by_processor = text_of(files_of(byte_fallback(), {"add_bos_token": True, "bos_token": "<s>"}), pool)
    assert (await by_processor.encode(TextPrompt("abc")))[:2] != (1, 1)
    assert (await by_processor.encode(TextPrompt("abc")))[0] == 1
    config = {"add_bos_token": True, "bos_token": "<|im_start|>"}
    by_config = text_of(files_of(byte_level(), config), pool)
    bos = byte_level().token_to_id("<|im_start|>")
    assert (await by_config.encode(TextPrompt("Paris")))[0] == bos
    by_manifest = text_of(files_of(byte_level()), pool, bos_token_id=5)
    assert (await by_manifest.encode(TextPrompt("Paris")))[0] == 5
    without = text_of(files_of(byte_level(), {"bos_token": "<|im_start|>"}), pool)
    assert (await without.encode(TextPrompt("Paris")))[0] != bos


async def test_bos_is_not_added_to_a_chat(pool):
    config = {"add_bos_token": True, "bos_token": "<s>", "chat_template": "{{ bos_token }}abc"}
    ids = await text_of(files_of(byte_fallback(), config), pool).encode(CHAT)
    assert ids[0] == 1
    assert ids.count(1) == 1


async def test_truncation_and_padding_of_training_are_switched_off(pool):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    ids = await text_of(files_of(tokenizer), pool).encode(TextPrompt("Paris is the capital of France"))
    assert byte_level().decode(list(ids)) == "Paris is the capital of France"


def test_defaults_come_from_the_generation_config(pool):
    stated = json.dumps({"temperature": 0.3}).encode()
    text = text_of(files_of(byte_level(), generation_config__json=stated), pool)
    assert text.defaults.temperature == 0.3


def test_the_detokeniser_fits_the_tokenizer(pool):
    by_bytes = text_of(files_of(byte_level()), pool).detokeniser((1,), keep_special=False)
    assert isinstance(by_bytes, ByteDetokeniser)
    other = byte_level()
    other.decoder = None  # type: ignore[assignment]
    window = text_of(files_of(other), pool).detokeniser((1,), keep_special=False)
    assert isinstance(window, WindowDetokeniser)


def test_a_first_space_is_stripped_only_where_the_text_begins(pool):
    text = text_of(files_of(byte_fallback()), pool)
    paris = byte_fallback().token_to_id("▁Paris")
    assert text.detokeniser((1,), keep_special=False).push([paris]) == "Paris"
    assert text.detokeniser((1, paris), keep_special=False).push([paris]) == " Paris"


@pytest.mark.parametrize(
    ("path", "data", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is no JSON"),
        ("generation_config.json", b"\xff", "generation_config.json is no JSON"),
    ],
)
def test_a_broken_file_is_named(pool, path, data, says):
    with pytest.raises(ValueError, match=says):
        text_of(files_of(byte_level()) | {path: data}, pool)
