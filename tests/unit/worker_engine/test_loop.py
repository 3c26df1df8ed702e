"""What the engine's process sends."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from services.worker.engine import loop
from services.worker.engine.config import EngineConfig
from services.worker.engine.errors import EngineError
from services.worker.engine.loader import LoadedModel
from services.worker.engine.loop import with_outputs
from services.worker.engine.progress import WeightsProgress
from services.worker.link import FrontLink
from services.worker.protocol import Cancel, Load, Output, Step, decode_event, encode

LOAD = Load(0, 0, 0, 0, 0, 0.0, 0.0)


def test_a_step_that_also_tells_of_refused_sequences_loses_nothing_else() -> None:
    step = Step([Output("b", [1], 0)], LOAD, 5, 6, [1 << 63], [2])
    more = with_outputs([Output("a", [], 0, finish="error")], step)
    assert [output.id for output in more.outputs] == ["a", "b"]
    assert more.outputs[1:] == step.outputs
    assert (more.load, more.step_ns, more.step_tokens) == (LOAD, 5, 6)
    assert (more.prefixes_stored, more.prefixes_evicted) == ([1 << 63], [2])
    assert decode_event(encode(more)[4:]) == more
    assert with_outputs([], step) is step


def test_a_step_without_changes_of_the_prefix_cache_says_nothing_of_it() -> None:
    assert b"prefixes" not in encode(Step([], LOAD, 5, 6))
    assert decode_event(encode(Step([], LOAD))[4:]) == Step([], LOAD)


def test_an_engine_that_loads_ends_with_its_front_though_it_looks_at_no_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front, ours = socket.socketpair()
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())

    def load_for_ever(config: EngineConfig, progress: object) -> LoadedModel:
        front.close()
        ended.wait(10)
        raise EngineError("MODEL_LOAD_FAILED", "only for this test")

    monkeypatch.setattr(loop, "load", load_for_ever)
    with ours, pytest.raises(BrokenPipeError):
        loop.EngineLoop(ours, EngineConfig(model_dir="")).run()
    assert ended.is_set()


def test_a_front_that_says_something_is_there_and_nothing_is_left_of_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "_exit", lambda status: None)
    front, ours = socket.socketpair()
    with front, ours:
        link = FrontLink(ours)
        open_before = len(os.listdir("/proc/self/fd"))
        front.sendall(encode(Cancel("a")))
        with link.ends_with_front():
            [watching] = [thread for thread in threading.enumerate() if "_watch" in thread.name]
            watching.join(0.1)
            assert watching.is_alive(), "it took a command for the end"
        assert not watching.is_alive()
        assert len(os.listdir("/proc/self/fd")) == open_before
        heard: list[str] = []
        link.apply(lambda submit: None, heard.append)
        assert heard == ["a"], "what was said meanwhile"


def test_a_load_tells_the_share_of_the_weights_that_came_a_hundred_times_at_most() -> None:
    told: list[tuple[str, float]] = []
    progress = WeightsProgress(lambda *what: told.append(what), 10_000)
    progress.came(5000)
    assert told == [("weights", 0.1), ("weights", pytest.approx(0.5))]
    for _ in range(5000):
        progress.came(1)
    progress.came(77)
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert (len(fractions) < 100, 0.88 < fractions[-1] <= 0.9) == (True, True)
    WeightsProgress(lambda *what: told.append(what), 0).came(0)
