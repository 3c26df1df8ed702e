"""The engine in this process, on a tiny random model: life of a sequence, resume, refusals, load."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.protocol import Output, Sampling, Submit
from tests.integration.engine.exactness import greedy, open_engine, run
from tests.integration.engine.families import random_prompts

PROMPT = [5, 17, 42, 99, 7, 3]


def sampled(name: str, prompt: list[int], count: int, output: list[int], seed: int = 5) -> Submit:
    sampling = Sampling(temperature=1.3, top_p=0.95, seed=seed, repetition_penalty=1.2, frequency_penalty=0.1)
    return Submit(name, prompt, output, count, 0, [], sampling)


def outputs_of(engine, *submits: Submit) -> list[Output]:
    for submit in submits:
        assert engine.submit(submit) is None
    found: list[Output] = []
    while not engine.idle:
        found += engine.step().outputs
    return found


@pytest.mark.parametrize("make", [sampled, lambda n, p, c, o: greedy(n, p, c, o)], ids=["sampled", "greedy"])
def test_a_resumed_stream_goes_on_with_the_same_tokens(tiny_llama: Path, make) -> None:
    whole = run(open_engine(tiny_llama), [make("a", PROMPT, 30, [])]).tokens["a"]
    for cut in (1, 7, 29):
        resumed = outputs_of(open_engine(tiny_llama), make("a", PROMPT, 30, whole[:cut]))
        assert [token for output in resumed for token in output.tokens] == whole[cut:]
        assert [output.index for output in resumed] == list(range(cut, 30))


def test_sampled_tokens_do_not_depend_on_the_rest_of_the_batch(tiny_llama: Path) -> None:
    prompts = random_prompts(10)
    submits = [sampled(f"s{n}", prompt, 25, [], seed=n) for n, prompt in enumerate(prompts)]
    alone = open_engine(tiny_llama)
    wanted = {submit.id: run(alone, [submit]).tokens[submit.id] for submit in submits}
    crowded = open_engine(tiny_llama, sequences_max=6, step_tokens_max=11, blocks=14)
    result = run(crowded, submits, per_step=2, leavers=3)
    assert result.preemptions > 0
    assert result.tokens == wanted


def test_seeds_differ(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama)
    result = run(engine, [sampled(f"s{n}", PROMPT, 12, [], seed=n) for n in range(8)])
    assert len({tuple(tokens) for tokens in result.tokens.values()}) == 8


def test_a_stop_token_ends_the_sequence_and_is_its_last(tiny_llama: Path) -> None:
    free = run(open_engine(tiny_llama), [greedy("a", PROMPT, 20)]).tokens["a"]
    stop = free[6]
    at = free.index(stop)
    submit = Submit("a", PROMPT, [], 20, 0, [stop], Sampling(temperature=0.0))
    found = outputs_of(open_engine(tiny_llama), submit)
    assert [token for output in found for token in output.tokens] == free[: at + 1]
    assert (found[-1].finish, found[-1].stop_token_id) == ("stop", stop)


def test_no_stop_token_comes_before_the_minimum(tiny_llama: Path) -> None:
    free = run(open_engine(tiny_llama), [greedy("a", PROMPT, 20)]).tokens["a"]
    submit = Submit("a", PROMPT, [], 20, 9, free[:3], Sampling(temperature=0.0))
    found = [token for output in outputs_of(open_engine(tiny_llama), submit) for token in output.tokens]
    assert not set(found[:9]) & set(free[:3])
    assert len(found) >= 10


def test_the_context_ends_a_sequence(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama, blocks=3)
    assert engine.ready().context_length == 48
    found = outputs_of(engine, greedy("a", PROMPT, 1000))
    assert sum(len(output.tokens) for output in found) == 48 - len(PROMPT)
    assert found[-1].finish == "length"


@pytest.mark.parametrize(
    ("submit", "why"),
    [
        (greedy("a", [], 5), "empty"),
        (greedy("a", [5] * 512, 5), "fill the context"),
        (greedy("a", [5, 211], 5), "outside the vocabulary"),
        (greedy("a", [5, -1], 5), "outside the vocabulary"),
        (greedy("a", [5], 5, [400]), "outside the vocabulary"),
        (Submit("a", [5], [], 5, 0, [999], Sampling()), "outside the vocabulary"),
        (Submit("a", [5], [], 5, 0, [], Sampling(logit_bias={-3: 1.0})), "outside the vocabulary"),
        (greedy("here", [5], 5), "of this id"),
    ],
)
def test_what_cannot_run_is_answered_at_once_and_harms_nobody(tiny_llama: Path, submit, why) -> None:
    engine = open_engine(tiny_llama)
    assert engine.submit(greedy("here", PROMPT, 3)) is None
    refusal = engine.submit(submit)
    assert refusal is not None
    assert (refusal.finish, refusal.tokens) == ("error", [])
    assert why in refusal.error
    assert len(outputs_of(engine)) == 3


def test_a_resume_that_is_complete_ends_at_once(tiny_llama: Path) -> None:
    ended = open_engine(tiny_llama).submit(greedy("a", PROMPT, 3, [1, 2, 3]))
    assert ended is not None
    assert (ended.finish, ended.index, ended.tokens) == ("length", 3, [])


def test_a_cancelled_sequence_is_silent_and_its_blocks_are_free(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama, blocks=40)
    engine.submit(greedy("a", PROMPT * 10, 100))
    engine.submit(greedy("b", PROMPT, 4))
    engine.step()
    assert engine.load().free_blocks == 40 - 4 - 1
    engine.cancel("a")
    assert engine.load().free_blocks == 40 - 1
    assert {output.id for output in outputs_of(engine)} == {"b"}
    engine.cancel("a")
    assert engine.load().free_blocks == 40


def test_the_first_and_the_last_output_say_how_long_it_took(tiny_llama: Path) -> None:
    first, *_, last = outputs_of(open_engine(tiny_llama), greedy("a", PROMPT, 5))
    assert first.prefill_ns > 0
    assert first.computed_prompt_tokens == last.computed_prompt_tokens == len(PROMPT)
    assert last.decode_ns > 0
    assert (last.steps, last.preemptions, last.cached_prompt_tokens) == (5, 0, 0)


def test_logprobs_come_with_each_token(tiny_llama: Path) -> None:
    submit = Submit("a", PROMPT, [], 4, 0, [], Sampling(temperature=0.0, logprobs=3))
    for output in outputs_of(open_engine(tiny_llama), submit):
        (found,) = output.logprobs
        assert found.top_ids[0] == output.tokens[0]
        assert found.chosen == pytest.approx(found.top[0])
        assert found.top == sorted(found.top, reverse=True)
        assert len(found.top) == 3


def test_an_idle_engine_steps_without_harm(tiny_llama: Path) -> None:
    step = open_engine(tiny_llama).step()
    assert (step.outputs, step.step_tokens) == ([], 0)


def test_bfloat16_runs(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama, dtype="bfloat16")
    assert engine.ready().dtype == "bfloat16"
    assert len(run(engine, [greedy("a", PROMPT, 10), sampled("b", PROMPT, 10, [])]).tokens["b"]) == 10
