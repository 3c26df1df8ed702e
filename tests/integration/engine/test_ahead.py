"""The engine with everything at once: found prefixes, steps begun ahead, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.worker.core.sequence import Sequence
from services.worker.engine.engine import GIVEN_UP, Engine
from services.worker.engine.errors import EngineError
from services.worker.engine.layout import BlockTables
from services.worker.engine.warmup import warm_up
from services.worker.protocol import Output, Sampling, Submit
from tests.integration.engine.exactness import greedy, open_engine, run
from tests.integration.engine.families import random_prompts
from tests.integration.engine.test_engine import PROMPT, outputs_of, sampled

SYSTEM = [(7 * n * n + 3 * n) % 211 for n in range(90)]


def turns(count: int, family: Callable[..., Submit] = sampled) -> list[Submit]:
    """Sequences that share their beginning, with penalties and seeds of their own."""
    return [family(f"s{n}", [*SYSTEM, n, *prompt], 20, []) for n, prompt in enumerate(random_prompts(count))]


def drive(engine: Engine, submits: list[Submit], leaver: str = "") -> dict[str, list[int]]:
    """Tokens of each sequence, with the next step always begun before the present one is computed."""
    found: dict[str, list[int]] = {submit.id: [] for submit in submits}
    waiting, steps = list(submits), 0
    while waiting or not engine.idle:
        if waiting:
            assert engine.submit(waiting.pop(0)) is None
        if engine.next() is None:
            engine.begin()
        engine.begin()
        if steps == 12 and leaver:
            engine.cancel(leaver)
        if (flight := engine.next()) is not None:
            for output in engine.tell(engine.settle(engine.compute(flight))).outputs:
                assert output.index == len(found[output.id])
                assert all(place.top_ids[0] == output.tokens[0] for place in output.logprobs)
                found[output.id] += output.tokens
        steps += 1
    assert not engine._histories
    return found


def test_a_found_prefix_gives_the_tokens_of_a_computed_one(tiny_llama: Path) -> None:
    submits = turns(6)
    cold = open_engine(tiny_llama, prefix_cache=False)
    wanted = {submit.id: run(cold, [submit]).tokens[submit.id] for submit in submits}
    warm = open_engine(tiny_llama)
    cached = []
    for submit in submits:
        outputs = outputs_of(warm, submit)
        assert [token for output in outputs for token in output.tokens] == wanted[submit.id]
        cached.append(outputs[0].cached_prompt_tokens)
        assert outputs[-1].computed_prompt_tokens == len(submit.prompt) - cached[-1]
    assert cached == [0, *[80] * 5]
    assert warm.load().cached_blocks >= 5


def test_another_root_finds_nothing(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama)
    sampling = Sampling(temperature=0.0)
    for root, cached in ((b"a", 0), (b"b", 0), (b"a", 80)):
        first, *_ = outputs_of(engine, Submit("x", SYSTEM, [], 3, 0, [], sampling, prefix_root=root))
        assert first.cached_prompt_tokens == cached


@pytest.mark.parametrize("blocks", [None, 24])
def test_steps_begun_ahead_give_the_same_tokens(tiny_llama: Path, blocks: int | None) -> None:
    submits = turns(8)
    alone = open_engine(tiny_llama, prefix_cache=False)
    wanted = {submit.id: run(alone, [submit]).tokens[submit.id] for submit in submits}
    engine = open_engine(tiny_llama, blocks=blocks, sequences_max=5, step_tokens_max=19)
    assert drive(engine, submits) == wanted


def test_one_who_leaves_or_stops_while_a_step_is_ahead_harms_nobody(tiny_llama: Path) -> None:
    sampling = Sampling(temperature=0.0, logprobs=1)
    submits = [Submit(f"s{n}", [*SYSTEM[:20], n], [], 20, 0, [], sampling) for n in range(5)]
    free = run(open_engine(tiny_llama), submits).tokens
    stop = free["s1"][6]
    submits[1] = Submit("s1", submits[1].prompt, [], 20, 0, [stop], sampling)
    found = drive(open_engine(tiny_llama), submits, leaver="s2")
    assert found["s1"] == free["s1"][: free["s1"].index(stop) + 1]
    assert found["s2"] == free["s2"][: len(found["s2"])]
    assert len(found["s2"]) < 20
    assert all(found[name] == free[name] for name in ("s0", "s3", "s4"))


def test_a_row_that_a_running_step_reads_is_not_overwritten_by_the_next_one() -> None:
    tables = BlockTables(1, 4)
    one, other, third = (Sequence(name, [1], 1, 9) for name in ("one", "other", "third"))
    one.blocks, other.blocks, third.blocks = [3], [4], [5]
    (first,) = tables.rows([one])
    (second,) = tables.rows([other])
    assert tables.table[[first, second], 0].tolist() == [3, 4]
    assert tables.rows([third]).tolist() == [first]


class Short:
    """A runner whose memory suffices for so many tokens a step, or sometimes does not."""

    def __init__(self, engine: Engine, error: Exception, tokens: int, every: int = 1) -> None:
        self._runner = engine._runner
        self._error, self._tokens, self._every = error, tokens, every
        self.failures = self._calls = 0
        self.ahead, self.forget = self._runner.ahead, self._runner.forget
        engine._runner = self  # type: ignore[assignment]

    def prepare(self, plan):
        return self._runner.prepare(plan)

    def launch(self, flat, histories):
        self._calls += 1
        if len(flat.ids) > self._tokens and self._calls % self._every == 0:
            self.failures += 1
            raise self._error
        return self._runner.launch(flat, histories)


CUDA = torch.OutOfMemoryError("CUDA out of memory")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("error", "tokens", "every"), [(CUDA, 30, 1), (CPU, 3, 1), (MemoryError(), 1, 3)])
def test_memory_that_runs_out_loses_no_sequence(tiny_llama: Path, error, tokens, every, ahead) -> None:
    submits = turns(5)
    alone = open_engine(tiny_llama)
    wanted = {submit.id: run(alone, [submit]).tokens[submit.id] for submit in submits}
    engine = open_engine(tiny_llama)
    short = Short(engine, error, tokens, every)
    found = drive(engine, submits) if ahead else run(engine, submits).tokens
    assert found == wanted
    assert short.failures > 0
    assert engine.load().free_blocks == engine.limits.total_blocks


def test_what_cannot_run_even_alone_is_given_up_and_the_others_are_not(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama)
    short = Short(engine, CUDA, 0)
    for name in "ab":
        assert engine.submit(greedy(name, PROMPT, 3)) is None
    outputs: list[Output] = []
    while not outputs:
        outputs += engine.step().outputs
    assert [(output.id, output.finish, output.error) for output in outputs] == [("a", "error", GIVEN_UP)]
    short._tokens = 1000
    assert {output.id for output in outputs_of(engine)} == {"b"}
    assert not engine._histories


def test_memory_that_runs_out_in_the_warm_up_is_a_model_too_large(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama)
    Short(engine, CUDA, 30)
    with pytest.raises(EngineError, match="first step of 512 tokens") as caught:
        warm_up(engine)
    assert caught.value.reason == "MODEL_TOO_LARGE"


def test_any_other_error_is_not_swallowed(tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama)
    Short(engine, RuntimeError("shapes do not match"), 0)
    engine.submit(greedy("a", PROMPT, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        engine.step()
