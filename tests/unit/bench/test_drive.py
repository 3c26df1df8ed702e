"""The engine's driver, on an engine whose clock and steps are written down here."""

import pytest

from services.worker.bench.drive import STILL_STEPS_MAX, Driver, Stuck
from services.worker.bench.options import parse
from services.worker.engine.config import ConfigError
from services.worker.protocol import Load, Output, Step
from tokenloom.bench import prompts, workload
from tokenloom.bench.stats import Objectives, level
from tokenloom.bench.workload import Lengths

LOAD = Load(0, 0, 0, 0, 0, 0.0, 0.0)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class FakeEngine:
    """A step computes one whole prompt (2 s), or one token of every sequence that has begun (1 s)."""

    def __init__(self, clock, refuse=()):
        self.clock = clock
        self.refuse = refuse
        self.waiting = []
        self.running = {}
        self.most = 0
        self.commands = []
        self.parts_ns = {"compute": 0}

    @property
    def idle(self):
        return not (self.waiting or self.running)

    def submit(self, command):
        self.commands.append(command)
        if len(self.commands) in self.refuse:
            return Output(command.id, [], 0, finish="error", error="too long")
        self.waiting.append(command)
        self.most = max(self.most, len(self.waiting) + len(self.running))
        return None

    def step(self):
        self.parts_ns["compute"] += 5_000_000
        if self.waiting:
            command = self.waiting.pop(0)
            self.running[command.id] = [command, 0]
            self.clock.now_s += 2
            return Step([self.draw(command.id, cached=3)], LOAD, 0, len(command.prompt))
        self.clock.now_s += 1
        decodes = len(self.running)
        return Step([self.draw(name) for name in list(self.running)], LOAD, 0, decodes)

    def draw(self, name, cached=0):
        command, drawn = self.running[name]
        self.running[name][1] = drawn + 1
        done = drawn + 1 == command.max_new_tokens
        if done:
            del self.running[name]
        return Output(name, [7], drawn, finish="length" if done else "", cached_prompt_tokens=cached)


def driven(count, concurrency, lengths, **more):
    clock = Clock()
    engine = FakeEngine(clock, **more)
    driver = Driver(engine, lambda item, seed: prompts.token_ids(item, seed, 1000), clock)
    told = []
    items = workload.fixed("request", count, lengths)
    records, run, steps = driver.run(items, concurrency, 1, lambda *said: told.append(said))
    return engine, records, run, steps, told


def test_one_sequence_by_hand():
    _, (record,), run, steps, told = driven(1, 1, Lengths(10, 4))
    assert record.due_s == 100
    assert record.pieces_s == [102, 103, 104, 105]
    assert (record.ended_s, record.output_tokens, record.prompt_tokens) == (105, 4, 10)
    assert record.cached_prompt_tokens == 3
    assert (steps.steps, steps.decode_step_ms.p50, steps.step_ms.max) == (4, 1000, 2000)
    assert steps.prefill_tokens_per_s == 5  # 10 tokens in a step of 2 s
    assert steps.step_tokens_mean == pytest.approx(13 / 4)
    assert steps.parts_ms == {"compute": 5}
    assert told == [(1, 4)]
    found = level([record], run, Objectives(), steps)
    assert found.output_throughput == pytest.approx(4 / 5)


def test_so_many_are_in_flight_and_every_request_ends_once():
    engine, records, _, _, told = driven(20, 6, Lengths(5, 3))
    assert engine.most == 6
    assert len({command.id for command in engine.commands}) == 20
    assert all(record.output_tokens == 3 and not record.error for record in records)
    assert told[-1] == (20, 60)


def test_answers_have_the_asked_length_and_no_stop_token():
    engine, *_ = driven(2, 1, Lengths(5, 3))
    for command in engine.commands:
        assert (command.max_new_tokens, command.min_new_tokens, command.stop_token_ids) == (3, 3, [])
        assert command.sampling.temperature == 0
    assert engine.commands[0].prompt != engine.commands[1].prompt


def test_a_refused_sequence_is_an_error_and_the_rest_goes_on():
    _, records, run, steps, _ = driven(5, 2, Lengths(5, 2), refuse={2, 3})
    assert [record.error for record in records] == ["", "TOO_LONG", "TOO_LONG", "", ""]
    assert level(records, run, Objectives(), steps).errors == {"TOO_LONG": 2}


def test_an_engine_that_does_nothing_is_noticed():
    class Still(FakeEngine):
        steps = 0

        def step(self):
            self.steps += 1
            return Step([], LOAD)

    engine = Still(Clock())
    driver = Driver(engine, lambda item, seed: [1])
    with pytest.raises(Stuck, match="did nothing"):
        driver.run(workload.fixed("request", 1, Lengths(1, 1)), 1, 0)
    assert engine.steps == STILL_STEPS_MAX + 1


def test_options_of_the_bench_process(capsys):
    options = parse(["--model-dir", "/m", "--batch", "1,8", "--slo-itl-ms", "5", "--requests", "3"])
    assert (options.batches, options.objectives.itl_ms, options.count(8)) == ((1, 8), 5, 3)
    assert parse(["--model-dir", "/m"]).count(8) == 32
    for wrong in (["--batch", "0"], ["--prompts", "x"], ["--output-tokens", "0"], ["--seed", "x"]):
        with pytest.raises(SystemExit):
            parse(["--model-dir", "/m", *wrong])
        assert wrong[0] in capsys.readouterr().err
    with pytest.raises(ConfigError, match="step_tokens_max"):
        parse(["--model-dir", "/m", "--sequences-max", "64", "--step-tokens-max", "8"])
