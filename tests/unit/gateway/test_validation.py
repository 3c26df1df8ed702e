"""Bounds: every problem of one request in one answer, each with the field's name."""

import math

import pytest

from services.gateway.core.plan import SamplingDefaults, defaults_from, make_plan
from services.gateway.core.refusal import Refusal, invalid
from services.gateway.core.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Output,
    Sampling,
    Stops,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.core.validation import ModelLimits, check_prompt_bytes, violations

LIMITS = ModelLimits(context_length=64, vocab_size=600)


def request(**changes):
    return GenerationRequest(**({"model": "m", "prompt": TextPrompt("hi")} | changes))


def fields(of, limits=LIMITS):
    return [violation.field for violation in violations(of, limits)]


def test_a_plain_request_has_no_problems():
    assert fields(request()) == []


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(temperature=-0.1), "sampling.temperature"),
        (Sampling(temperature=2.5), "sampling.temperature"),
        (Sampling(temperature=math.nan), "sampling.temperature"),
        (Sampling(temperature=math.inf), "sampling.temperature"),
        (Sampling(top_p=0.0), "sampling.top_p"),
        (Sampling(top_p=1.1), "sampling.top_p"),
        (Sampling(top_k=-2), "sampling.top_k"),
        (Sampling(top_k=601), "sampling.top_k"),
        (Sampling(min_p=-0.1), "sampling.min_p"),
        (Sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (Sampling(repetition_penalty=1e9), "sampling.repetition_penalty"),
        (Sampling(presence_penalty=3), "sampling.presence_penalty"),
        (Sampling(frequency_penalty=-3), "sampling.frequency_penalty"),
        (Sampling(seed=-1), "sampling.seed"),
        (Sampling(seed=2**64), "sampling.seed"),
        (Sampling(logit_bias={5: 200.0}), "sampling.logit_bias[5]"),
        (Sampling(logit_bias={600: 1.0}), "sampling.logit_bias[600]"),
        (Sampling(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias"),
    ],
)
def test_sampling_outside_its_bounds_is_named(sampling, field):
    assert fields(request(sampling=sampling)) == [field]


@pytest.mark.parametrize(
    ("stops", "field"),
    [
        (Stops(max_new_tokens=0), "stop.max_new_tokens"),
        (Stops(max_new_tokens=-5), "stop.max_new_tokens"),
        (Stops(min_new_tokens=-1), "stop.min_new_tokens"),
        (Stops(max_new_tokens=2, min_new_tokens=3), "stop.min_new_tokens"),
        (Stops(strings=("",)), "stop.stop[0]"),
        (Stops(strings=("x" * 257,)), "stop.stop[0]"),
        (Stops(strings=tuple("abcdefghijklmnopq")), "stop.stop"),
        (Stops(token_ids=(600,)), "stop.stop_token_ids[0]"),
        (Stops(token_ids=(-1,)), "stop.stop_token_ids[0]"),
        (Stops(token_ids=tuple(range(65))), "stop.stop_token_ids"),
    ],
)
def test_stops_outside_their_bounds_are_named(stops, field):
    assert fields(request(stops=stops)) == [field]


@pytest.mark.parametrize(
    ("output", "field"),
    [
        (Output(logprobs=True, top_logprobs=21), "output.top_logprobs"),
        (Output(top_logprobs=1), "output.top_logprobs"),
        (Output(choice_count=0), "output.choice_count"),
        (Output(choice_count=17), "output.choice_count"),
    ],
)
def test_output_outside_its_bounds_is_named(output, field):
    assert fields(request(output=output)) == [field]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "input"),
        (TextPrompt(""), "prompt"),
        (TokenPrompt(()), "prompt_token_ids"),
        (TokenPrompt((1, 600)), "prompt_token_ids"),
        (ChatPrompt(()), "chat.messages"),
        (ChatPrompt((ChatMessage("user", "x"),) * 4097), "chat.messages"),
        (ChatPrompt((ChatMessage("user", "x"), ChatMessage("robot", "x"))), "chat.messages[1].role"),
        (ChatPrompt((ChatMessage("user", "x", "n" * 65),)), "chat.messages[0].name"),
    ],
)
def test_an_input_that_cannot_be_used_is_named(prompt, field):
    assert fields(request(prompt=prompt)) == [field]


def test_keys_and_times_have_bounds_too():
    bad = request(session_key="x" * 129, cache_salt="x" * 65, queue_timeout_s=-1.0)
    assert fields(bad) == ["session_key", "cache_salt", "queue_timeout"]


def test_every_problem_is_reported_at_once():
    bad = request(
        prompt=TextPrompt(""),
        sampling=Sampling(temperature=3, top_p=-1),
        stops=Stops(max_new_tokens=0),
        output=Output(choice_count=99),
    )
    found = violations(bad, LIMITS)
    assert len(found) == 5
    message = invalid(found).message
    assert "sampling.temperature: must be from 0 to 2, not 3" in message
    assert "output.choice_count: must be from 1 to 16, not 99" in message


def test_without_a_model_only_its_own_bounds_are_left_out():
    bad = request(prompt=TokenPrompt((10**6,)), sampling=Sampling(top_k=10**6, temperature=-1))
    assert fields(bad, None) == ["sampling.temperature"]


def test_a_prompt_is_measured_in_bytes_over_all_messages():
    chat = ChatPrompt((ChatMessage("user", "é" * 6), ChatMessage("user", "é" * 6)))
    check_prompt_bytes(chat, 24)
    with pytest.raises(Refusal, match="24 bytes of text; at most 23") as refused:
        check_prompt_bytes(chat, 23, lambda _: "messages")
    assert refused.value.reason == "REQUEST_TOO_LARGE"
    assert refused.value.metadata == {"field": "messages", "size": "24", "limit": "23"}


PLAIN = SamplingDefaults()


def plan(of, prompt_ids=(1, 2, 3), defaults=PLAIN, seed=7):
    return make_plan(of, prompt_ids, context_length=64, model_stop_ids=(0, 9), defaults=defaults, seed=seed)


def test_absent_fields_take_the_values_that_switch_them_off():
    sampling = plan(request()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.seed) == (1.0, 7)


def test_a_models_own_defaults_come_before_ours_and_the_callers_before_both():
    stated = defaults_from({"temperature": 0.2, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1})
    sampling = plan(request(sampling=Sampling(top_k=5, seed=1)), defaults=stated).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.2, 5, 0.9)
    assert (sampling.repetition_penalty, sampling.seed) == (1.1, 1)


def test_defaults_of_the_wrong_type_are_passed_over():
    stated = defaults_from({"temperature": "hot", "top_k": None, "top_p": True, "min_p": -3})
    assert stated == SamplingDefaults()


def test_without_max_new_tokens_the_rest_of_the_context_is_free():
    assert plan(request()).max_new_tokens == 61


def test_the_callers_stops_join_the_models_unless_those_are_ignored():
    assert plan(request(stops=Stops(token_ids=(5, 9)))).stop_token_ids == (0, 9, 5)
    assert plan(request(stops=Stops(token_ids=(5,), ignore_eos=True))).stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("prompt_tokens", "stops"),
    [(64, Stops()), (60, Stops(max_new_tokens=5)), (60, Stops(min_new_tokens=5)), (70, Stops())],
)
def test_what_does_not_fit_in_the_context_is_refused_with_all_the_numbers(prompt_tokens, stops):
    with pytest.raises(Refusal) as refused:
        plan(request(stops=stops), tuple(range(prompt_tokens)))
    assert refused.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert refused.value.metadata["prompt_tokens"] == str(prompt_tokens)
    assert refused.value.metadata["context_length"] == "64"


def test_what_just_fits_is_taken():
    assert plan(request(stops=Stops(max_new_tokens=4)), tuple(range(60))).max_new_tokens == 4
    assert plan(request(), tuple(range(63))).max_new_tokens == 1


def test_choices_draw_from_seeds_of_their_own_that_are_always_the_same():
    made = plan(request(sampling=Sampling(seed=2**64 - 1)))
    assert [made.seed_of(n) for n in range(3)] == [2**64 - 1, 0, 1]
