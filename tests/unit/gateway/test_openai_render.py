"""OpenAI's JSON, read back by a JSON parser and by the official client's own types."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.gateway.core.choice import End, Event, PositionLogprobs
from services.gateway.core.openai_render import (
    DONE,
    AnswerHead,
    ChatRenderer,
    Tally,
    TextRenderer,
    error_body,
)
from services.gateway.core.refusal import Violation
from services.gateway.core.request import Finish

HEAD = AnswerHead("req-1", 1_700_000_000, 'my "model"', "sha256:" + "ab" * 32)
TALLY = Tally(5, 2, 7)
SPELLINGS = {1: b"Par", 2: b"is", 3: "é".encode()[:1]}


def made(kind, include_usage=False, token_ids=False):
    return kind(HEAD, lambda i: SPELLINGS.get(i, b""), include_usage=include_usage, token_ids=token_ids)


def event(text, choice=0, ids=(1,), logprobs=(), end=None):
    return Event(choice, text, ids, logprobs, end)


def read(chunk):
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    return json.loads(chunk[6:])


def test_chat_chunks_are_what_the_official_client_expects():
    renderer = made(ChatRenderer)
    first, second = read(renderer.chunk(event("Par"))), read(renderer.chunk(event("is")))
    last = read(renderer.chunk(event(".", end=End(Finish.LENGTH))))
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "Par"},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert second["choices"][0]["delta"] == {"content": "is"}
    assert last["choices"][0]["finish_reason"] == "length"
    for chunk in (first, second, last):
        assert "usage" not in chunk
        ChatCompletionChunk.model_validate(chunk)
    assert (first["id"], first["model"], first["created"]) == ("chatcmpl-req-1", 'my "model"', 1_700_000_000)
    assert first["system_fingerprint"] == "fp_abababababab"


@given(st.text())
def test_every_text_survives_being_a_chunk(text):
    assert read(made(ChatRenderer).chunk(event(text)))["choices"][0]["delta"]["content"] == text
    assert read(made(TextRenderer).chunk(event(text)))["choices"][0]["text"] == text


def test_usage_comes_last_and_is_null_before():
    renderer = made(ChatRenderer, include_usage=True)
    assert read(renderer.chunk(event("x")))["usage"] is None
    last = read(renderer.usage_chunk(TALLY))
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    ChatCompletionChunk.model_validate(last)


def test_each_choice_begins_with_its_role():
    renderer = made(ChatRenderer)
    chunks = [read(renderer.chunk(event("x", choice=n))) for n in (0, 1, 0, 1)]
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles == ["assistant", "assistant", None, None]


def test_whole_chat_answers_gather_their_choices():
    renderer = made(ChatRenderer)
    for part in (event("b", choice=1), event("Par"), event("is", end=End(Finish.STOP, matched_stop="!"))):
        renderer.add(part)
    renderer.add(event("", choice=1, ids=(), end=End(Finish.LENGTH)))
    whole = renderer.whole(TALLY)
    assert [c["message"]["content"] for c in whole["choices"]] == ["Paris", "b"]
    assert [c["finish_reason"] for c in whole["choices"]] == ["stop", "length"]
    assert whole["choices"][0]["stop_reason"] == "!"
    ChatCompletion.model_validate(whole)


def test_whole_text_answers_gather_their_choices():
    renderer = made(TextRenderer, token_ids=True)
    renderer.add(event("Par"))
    renderer.add(event("is", ids=(2,), end=End(Finish.STOP)))
    whole = renderer.whole(TALLY)
    assert (whole["choices"][0]["text"], whole["choices"][0]["token_ids"]) == ("Paris", [1, 2])
    assert whole["id"] == "cmpl-req-1"
    Completion.model_validate(whole)


def test_chat_logprobs_spell_each_token_and_its_alternatives():
    renderer = made(ChatRenderer)
    position = PositionLogprobs(-0.5, (1, 3), (-0.5, float("-inf")))
    entry = read(renderer.chunk(event("Par", logprobs=(position,))))["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("Par", -0.5, [80, 97, 114])
    assert entry["top_logprobs"][1] == {"token": "�", "logprob": -9999.0, "bytes": [195]}


def test_text_logprobs_are_columns_with_offsets_over_the_whole_output():
    renderer = made(TextRenderer)
    position = PositionLogprobs(-0.5, (1,), (-0.5,))
    renderer.add(event("Par", logprobs=(position,)))
    renderer.add(event("is", ids=(2,), logprobs=(position,), end=End(Finish.STOP)))
    columns = renderer.whole(TALLY)["choices"][0]["logprobs"]
    assert columns["tokens"] == ["Par", "is"]
    assert columns["text_offset"] == [0, 3]
    assert columns["top_logprobs"] == [{"Par": -0.5}, {"Par": -0.5}]


@pytest.mark.parametrize("kind", [ChatRenderer, TextRenderer])
def test_token_ids_come_along_when_asked_for(kind):
    chunk = read(made(kind, token_ids=True).chunk(event("x", ids=(1, 2))))
    assert chunk["choices"][0]["token_ids"] == [1, 2]


def test_an_error_names_its_reason_and_the_first_field():
    body = error_body("bad", "invalid_request_error", "FIELD_INVALID", [Violation("top_p", "x")])
    assert body == {
        "error": {
            "message": "bad",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "field_invalid",
        }
    }


def test_a_stream_ends_as_openais_does():
    assert DONE == b"data: [DONE]\n\n"
