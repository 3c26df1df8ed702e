"""OpenAI's bodies: what is taken, what is ignored, what is refused by name, what is a mistake."""

import pytest

from services.gateway.core.openai_body import parse_chat, parse_text
from services.gateway.core.request import (
    ChatMessage,
    ChatPrompt,
    Priority,
    Sampling,
    TextPrompt,
    TokenPrompt,
)

USER = {"role": "user", "content": "hi"}


def chat(**fields):
    return parse_chat({"model": "m", "messages": [USER], **fields})


def text(**fields):
    return parse_text({"model": "m", "prompt": "hi", **fields})


def problems(parsed):
    return {violation.field: violation.why for violation in parsed.problems}


def refused(parsed):
    return [violation.field for violation in parsed.unsupported]


def test_a_chat_body_becomes_the_request_it_means():
    parsed = chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, presence_penalty=1,
        frequency_penalty=-1, seed=-1, logit_bias={"5": -100}, max_completion_tokens=9, max_tokens=5,
        min_tokens=2, stop="END", stop_token_ids=[3], ignore_eos=True, include_stop_str_in_output=True,
        logprobs=True, top_logprobs=3, n=2, skip_special_tokens=False, return_token_ids=True,
        priority="batch", cache_salt="s", stream=True, stream_options={"include_usage": True},
        add_generation_prompt=False,
    )  # fmt: skip
    assert parsed.problems == parsed.unsupported == ()
    request = parsed.request
    assert request.prompt == ChatPrompt((ChatMessage("user", "hi"),), add_generation_prompt=False)
    assert request.sampling == Sampling(0.5, 0.9, 40, 0.1, 1.1, 1, -1, 2**64 - 1, {5: -100})
    stops = request.stops
    assert (stops.max_new_tokens, stops.min_new_tokens, stops.strings) == (9, 2, ("END",))
    assert (stops.token_ids, stops.ignore_eos, stops.include_stop) == ((3,), True, True)
    output = request.output
    assert (output.logprobs, output.top_logprobs, output.choice_count) == (True, 3, 2)
    assert (output.keep_special_tokens, output.token_ids) == (True, True)
    assert (request.priority, request.cache_salt) == (Priority.BATCH, "s")
    assert (parsed.options.stream, parsed.options.include_usage) == (True, True)


def test_null_means_absent():
    names = ("temperature", "stop", "seed", "logit_bias", "tools", "n", "stream", "stream_options", "user")
    parsed = chat(**dict.fromkeys(names))
    assert parsed.problems == parsed.unsupported == ()
    assert parsed.request.sampling == Sampling()


def test_harmless_fields_are_ignored():
    parsed = chat(
        metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=True, prompt_cache_key="k",
    )  # fmt: skip
    assert parsed.problems == parsed.unsupported == ()
    assert parsed.request.session_key == ""


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"user": "me"}, "me"),
        ({"safety_identifier": "hashed"}, "hashed"),
        ({"user": "me", "safety_identifier": "hashed"}, "me"),
        ({"user": "", "safety_identifier": "hashed"}, "hashed"),
        ({"user": None}, ""),
    ],
)
def test_who_asks_is_the_session(given, key):
    for parsed in (chat(**given), text(**given)):
        assert parsed.problems == ()
        assert parsed.request.session_key == key


def test_a_long_user_counts_by_its_hash():
    long = chat(user="x" * 5000).request.session_key
    assert len(long) == 64
    assert long == chat(user="x" * 5000).request.session_key != chat(user="x" * 5001).request.session_key
    assert chat(user="x" * 128).request.session_key == "x" * 128


def test_a_user_that_is_no_string_is_named():
    assert problems(chat(user=7)) == {"user": "must be a string, not the number 7"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"json": {}}),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("chat_template", "{{ x }}"),
        ("use_beam_search", True),
        ("length_penalty", 2),
        ("bad_words", ["x"]),
        ("continue_final_message", True),
    ],
)
def test_a_known_feature_that_is_not_offered_is_refused_by_name(field, value):
    assert refused(chat(**{field: value})) == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("echo", False), ("length_penalty", 1.0), ("use_beam_search", False), ("documents", []),
    ],
)  # fmt: skip
def test_the_same_feature_switched_off_is_taken(field, value):
    assert refused(chat(**{field: value})) == []


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "x"), ("best_of", 3)])
def test_completions_refuse_their_own_features(field, value):
    assert refused(text(**{field: value})) == [field]


def test_best_of_that_changes_nothing_is_taken():
    assert refused(text(best_of=1)) == refused(text(best_of=2, n=2)) == []


def test_an_unknown_field_is_a_mistake_and_is_named():
    found = problems(chat(temprature=0.1))
    assert list(found) == ["temprature"]
    assert "remove it" in found["temprature"]


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("temperature", "hot", "must be a number, not the string 'hot'"),
        ("temperature", True, "must be a number, not true or false"),
        ("max_tokens", 1.5, "must be a whole number, not the number 1.5"),
        ("stream", "yes", "must be true or false, not the string 'yes'"),
        ("stop", 5, "must be a string or a list of strings, not the number 5"),
        ("stop", ["a", 1], "must be a string or a list of strings, not a list"),
        ("stop_token_ids", ["a"], "must be a list of token ids, not a list"),
        ("logit_bias", [1], "must be an object, not a list"),
        ("logit_bias", {"x": 1}, "'x': must map a token id to a number"),
        ("seed", 2**70, f"must be from {-(2**63)} to {2**64 - 1}"),
        ("priority", "urgent", "must be one of interactive, standard, batch, sheddable"),
        ("n", "two", "must be a whole number"),
        ("stream_options", True, "must be an object"),
        ("messages", "hi", "must be a list, not the string 'hi'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field, value, why):
    assert problems(chat(**{field: value}))[field].startswith(why)


def test_every_problem_is_found_at_once():
    parsed = parse_chat({"temperature": "x", "top_p": [], "foo": 1, "messages": [{"role": "user"}]})
    assert list(problems(parsed)) == ["messages[0].content", "model", "temperature", "top_p", "foo"]


def test_thousands_of_unknown_fields_are_not_answered_one_by_one():
    assert len(parse_chat({f"field{i}": 1 for i in range(5000)}).problems) <= 64


def test_stream_options_need_a_stream_and_know_their_fields():
    assert "stream_options" in problems(chat(stream_options={"include_usage": True}))
    assert "stream_options.foo" in problems(chat(stream=True, stream_options={"foo": 1}))
    assert refused(chat(stream=True, stream_options={"continuous_usage_stats": True})) == [
        "stream_options.continuous_usage_stats"
    ]


@pytest.mark.parametrize(
    ("given_as", "meant"),
    [
        ("text", TextPrompt("text")),
        (["text"], TextPrompt("text")),
        ([1, 2], TokenPrompt((1, 2))),
        ([[1, 2]], TokenPrompt((1, 2))),
        ([], TokenPrompt(())),
    ],
)
def test_a_prompt_is_text_or_token_ids(given_as, meant):
    parsed = text(prompt=given_as)
    assert parsed.problems == ()
    assert parsed.request.prompt == meant


def test_several_prompts_are_refused_and_nonsense_is_a_mistake():
    assert refused(text(prompt=["a", "b"])) == ["prompt"]
    assert problems(text(prompt={"a": 1})) == {
        "prompt": "must be a string or a list of token ids, not an object"
    }
    assert problems(text(prompt=None)) == {"prompt": "is required"}
    assert problems(text(prompt=[True, False])).keys() == {"prompt"}


def test_text_logprobs_are_a_count():
    parsed = text(logprobs=0)
    assert (parsed.request.output.logprobs, parsed.request.output.top_logprobs) == (True, 0)
    assert text().request.output.logprobs is False


def test_top_k_of_minus_one_switches_it_off_as_with_vllm():
    assert chat(top_k=-1).request.sampling.top_k == 0


def test_messages_take_text_parts_and_what_clients_send_back():
    parsed = parse_chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "be brief", "name": "dev"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {
                    "role": "assistant", "content": "c", "refusal": None, "annotations": [],
                    "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": "hm",
                },
                {"role": "tool", "content": "d", "tool_call_id": "1"},
            ],
        }
    )  # fmt: skip
    assert parsed.problems == parsed.unsupported == ()
    assert parsed.request.prompt.messages == (
        ChatMessage("system", "be brief", "dev"),
        ChatMessage("user", "a\nb"),
        ChatMessage("assistant", "c"),
        ChatMessage("tool", "d"),
    )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("hi", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": 5, "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "sound"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}, "messages[0].content[0].y"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages[0].colour"),
    ],
)
def test_a_broken_message_is_named_by_its_path(message, field):
    assert list(problems(parse_chat({"model": "m", "messages": [message]}))) == [field]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].image_url",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(message, field):
    assert refused(parse_chat({"model": "m", "messages": [message]})) == [field]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sampling.top_p", "top_p"),
        ("sampling.logit_bias[5]", "logit_bias[5]"),
        ("stop.max_new_tokens", "max_tokens"),
        ("stop.stop", "stop"),
        ("stop.stop[2]", "stop[2]"),
        ("stop.stop_token_ids[0]", "stop_token_ids[0]"),
        ("output.choice_count", "n"),
        ("chat.messages[1].role", "messages[1].role"),
        ("input", "prompt"),
    ],
)
def test_bounds_are_reported_under_the_bodys_own_names(ours, theirs):
    assert chat().name_of(ours) == theirs


def test_a_field_with_two_names_is_reported_under_the_one_that_was_sent():
    assert chat(max_completion_tokens=-1).name_of("stop.max_new_tokens") == "max_completion_tokens"
    assert text().name_of("output.top_logprobs") == "logprobs"
