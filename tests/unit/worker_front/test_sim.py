"""The sim engine: its two laws, and that it plans as the real scheduler does."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.protocol import (
    Cancel,
    Event,
    FrameReader,
    Output,
    Ready,
    Sampling,
    Shutdown,
    Step,
    Submit,
    decode_event,
    encode,
)
from services.worker.sim.config import SimConfig, decode_sim_config, encode_sim_config
from services.worker.sim.engine import SimEngine
from services.worker.sim.law import step_s, token_at
from services.worker.sim.loop import SimLoop

ALLOWED = {ord(" "), *range(ord("a"), ord("z") + 1)}


def submit(
    key: str = "1",
    prompt: int = 3,
    output: list[int] | None = None,
    *,
    new: int = 8,
    least: int = 0,
    stop: list[int] | None = None,
    seed: int = 5,
    logprobs: int = -1,
) -> Submit:
    sampling = Sampling(seed=seed, logprobs=logprobs)
    return Submit(key, [65] * prompt, output or [], new, least, stop or [], sampling)


def run(engine: SimEngine, steps: int = 1000) -> dict[str, list[Output]]:
    """Every output until nothing is left to do, a millisecond a step."""
    outputs: dict[str, list[Output]] = {}
    for now in range(steps):
        plan = engine.plan(now * 1_000_000)
        if not plan:
            return outputs
        for output in engine.settle(plan, (now + 1) * 1_000_000):
            outputs.setdefault(output.id, []).append(output)
    raise AssertionError("it never ends")


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_token_is_a_letter_or_a_space_and_depends_on_nothing_else(seed: int, position: int) -> None:
    token = token_at(seed, position, 512)
    assert token in ALLOWED
    assert token == token_at(seed, position, 512)
    assert token_at(seed, position, 10) < 10


def test_tokens_look_random_and_differ_between_seeds() -> None:
    first, second = ([token_at(seed, n, 512) for n in range(2000)] for seed in (1, 2))
    assert len(set(first)) == len(ALLOWED)
    assert 0.12 < first.count(ord(" ")) / 2000 < 0.22
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 400


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(0, 19))
def test_stream_that_goes_on_elsewhere_goes_on_identically(seed: int, prompt: int, cut: int) -> None:
    engine = SimEngine(SimConfig())
    assert engine.submit(submit(prompt=prompt, new=20, seed=seed), 0) is None
    whole = tokens_of(run(engine)["1"])
    elsewhere = SimEngine(SimConfig(step_tokens_max=64, sequences_max=3))
    assert elsewhere.submit(submit(prompt=prompt, output=whole[:cut], new=20, seed=seed), 0) is None
    rest = run(elsewhere)["1"]
    assert rest[0].index == cut
    assert whole[:cut] + tokens_of(rest) == whole


def test_step_time_follows_the_law() -> None:
    config = SimConfig(step_ms=10, sequence_us=100, prefill_tokens_per_s=1000)
    assert step_s(config, 0, 0) == pytest.approx(0.010)
    assert step_s(config, 50, 0) == pytest.approx(0.015)
    assert step_s(config, 1, 200) == pytest.approx(0.2101)
    engine = SimEngine(config)
    engine.submit(submit("1", prompt=30), 0)
    engine.submit(submit("2", prompt=20), 0)
    plan = engine.plan(0)
    assert engine.duration_s(plan) == pytest.approx(0.010 + 0.0002 + 0.05)
    engine.settle(plan, 1)
    assert engine.duration_s(engine.plan(2)) == pytest.approx(0.0102)


def test_stop_token_is_heeded_only_after_the_least_tokens() -> None:
    engine = SimEngine(SimConfig())
    engine.submit(submit(new=30), 0)
    whole = tokens_of(run(engine)["1"])
    for least in (0, 10):
        engine.submit(submit(new=30, least=least, stop=[whole[2]]), 0)
        outputs = run(engine)["1"]
        end = next((n for n in range(least, 30) if whole[n] == whole[2]), 29)
        assert tokens_of(outputs) == whole[: end + 1]
        stopped = whole[end] == whole[2]
        assert (outputs[-1].finish, outputs[-1].stop_token_id) == (
            ("stop", whole[2]) if stopped else ("length", -1)
        )


def test_last_output_tells_what_the_sequence_cost() -> None:
    engine = SimEngine(SimConfig(step_tokens_max=64))
    engine.submit(submit(prompt=100, new=5), 0)
    last = run(engine)["1"][-1]
    assert (last.computed_prompt_tokens, last.steps, last.preemptions) == (100, 6, 0)
    assert (last.waiting_ns, last.prefill_ns, last.decode_ns) == (0, 2_000_000, 4_000_000)


def test_first_output_tells_what_the_cache_held() -> None:
    engine = SimEngine(SimConfig(step_tokens_max=64))
    engine.submit(submit(prompt=100), 0)
    assert run(engine)["1"][0].cached_prompt_tokens == 0
    engine.submit(submit(prompt=100), 0)
    first, *_, last = run(engine)["1"]
    assert first.cached_prompt_tokens == last.cached_prompt_tokens == 96
    assert last.computed_prompt_tokens == 4
    assert engine.load().cached_blocks == 6


def test_without_the_cache_every_token_is_computed() -> None:
    engine = SimEngine(SimConfig(prefix_cache=False))
    for _ in range(2):
        engine.submit(submit(prompt=100), 0)
        assert run(engine)["1"][-1].computed_prompt_tokens == 100


def test_logprobs_come_one_for_each_token() -> None:
    engine = SimEngine(SimConfig())
    engine.submit(submit(logprobs=2), 0)
    for output in run(engine)["1"]:
        assert [len(entry.top_ids) for entry in output.logprobs] == [2]
        assert output.logprobs[0].top_ids[0] == output.tokens[0]


def test_cancelled_sequence_is_free_before_the_next_step() -> None:
    engine = SimEngine(SimConfig(sequences_max=1, total_blocks=8, context_length=128))
    engine.submit(submit("1", new=50), 0)
    engine.submit(submit("2"), 0)
    plan = engine.plan(0)
    engine.cancel("1")
    assert engine.settle(plan, 1) == []
    assert (engine.load().running, engine.load().waiting) == (0, 1)
    assert set(run(engine)) == {"2"}
    assert engine.load().free_blocks == 8


def test_sequence_that_can_never_run_is_refused() -> None:
    engine = SimEngine(SimConfig(total_blocks=2, context_length=4096))
    assert engine.ready().context_length == 32
    refused = engine.submit(submit(prompt=33), 0)
    assert refused is not None
    assert refused.finish == "error"
    engine.cancel("1")


def test_short_of_blocks_everyone_still_ends_with_the_same_tokens() -> None:
    engine = SimEngine(SimConfig(total_blocks=8, block_tokens=4, context_length=32, sequences_max=4))
    for key in "1234":
        engine.submit(submit(key, prompt=5, new=20, seed=int(key)), 0)
    outputs = run(engine)
    assert sum(stream[-1].preemptions for stream in outputs.values()) > 0
    for key, stream in outputs.items():
        assert tokens_of(stream) == [token_at(int(key), 5 + n, 512) for n in range(20)]


def test_configuration_survives_the_command_line_and_names_what_is_wrong() -> None:
    config = SimConfig(step_ms=3.5, total_blocks=7)
    assert decode_sim_config(encode_sim_config(config)) == config
    with pytest.raises(ValueError, match="step_ms"):
        decode_sim_config('{"step_ms": -1}')
    with pytest.raises(ValueError, match="speed"):
        decode_sim_config('{"speed": 1}')


class Peer:
    """The front's end of a sim process's socket, the process being a thread."""

    def __init__(self, config: SimConfig) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10)
        self._theirs = theirs
        self.thread = threading.Thread(target=SimLoop(theirs, config).run)
        self.thread.start()
        self._reader = FrameReader()
        self._events: list[Event] = []

    def next(self) -> Event:
        while not self._events:
            self._events += [decode_event(body) for body in self._reader.feed(self.socket.recv(65536))]
        return self._events.pop(0)

    def end(self) -> None:
        self.socket.close()
        self.thread.join(10)
        self._theirs.close()
        assert not self.thread.is_alive()


def test_process_steps_in_its_time_and_ends_with_its_socket() -> None:
    peer = Peer(SimConfig(step_ms=5))
    assert isinstance(peer.next(), Ready)
    idle = peer.next()
    assert isinstance(idle, Step)
    assert not idle.outputs
    began = time.monotonic()
    peer.socket.sendall(encode(submit("a")) + encode(submit("b", new=20)) + encode(Cancel("nobody")))
    tokens = 0
    while tokens < 28:
        event = peer.next()
        assert isinstance(event, Step)
        tokens += sum(len(output.tokens) for output in event.outputs)
    assert time.monotonic() - began >= 20 * 0.005
    peer.end()


def test_process_ends_when_told_to() -> None:
    peer = Peer(SimConfig())
    peer.socket.sendall(encode(Shutdown()))
    peer.thread.join(10)
    assert not peer.thread.is_alive()
    peer.end()
