"""The engine's own process, over its socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.worker.engine.config import EngineConfig, encode_config
from services.worker.protocol import (
    Cancel,
    Event,
    Failed,
    FrameReader,
    Output,
    Progress,
    Ready,
    Sampling,
    Shutdown,
    Step,
    Submit,
    decode_event,
    encode,
)
from tests.integration.engine.exactness import greedy, open_engine, run

WAIT_S = 120


class Front:
    """The other end of an engine's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._reader = FrameReader()
        self._events: list[Event] = []

    def send(self, *commands: Submit | Cancel | Shutdown) -> None:
        self.socket.sendall(b"".join(encode(command) for command in commands))

    def next(self) -> Event:
        """Raises EOFError when the engine closed its end."""
        while not self._events:
            data = self.socket.recv(1 << 20)
            if not data:
                raise EOFError
            self._events += [decode_event(body) for body in self._reader.feed(data)]
        return self._events.pop(0)

    def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """Events up to the first that is wanted."""
        events = [self.next()]
        while not wanted(events[-1]):
            events.append(self.next())
        return events

    def outputs(self, finished: int) -> list[Output]:
        """Outputs until so many sequences have ended."""
        found: list[Output] = []
        while sum(bool(output.finish) for output in found) < finished:
            event = self.next()
            assert isinstance(event, Step)
            found += event.outputs
        return found


@contextmanager
def engine(folder: Path, **settings) -> Iterator[tuple[subprocess.Popen[bytes], Front]]:
    ours, theirs = socket.socketpair()
    config = EngineConfig(model_dir=str(folder), **{"device": "cpu", "threads": 1, **settings})
    command = [sys.executable, "-m", "services.worker.engine", "--fd", str(theirs.fileno())]
    process = subprocess.Popen([*command, "--config", encode_config(config)], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.settimeout(WAIT_S)
    with ours:
        yield process, Front(ours)
    assert process.wait(WAIT_S) is not None


@pytest.fixture(scope="module", params=[1, 2], ids=["in turn", "ahead"])
def running(tiny_llama: Path, request: pytest.FixtureRequest) -> Iterator[Front]:
    """One engine that is ready, for several tests."""
    depth: int = request.param
    with engine(tiny_llama, dtype="float32", sequences_max=8, pipeline_depth=depth) as (process, front):
        events = front.until(lambda event: isinstance(event, Ready))
        assert all(isinstance(event, Progress) for event in events[:-1])
        fractions = [event.fraction for event in events[:-1]]
        assert fractions == sorted(fractions)
        assert events[-1].vocab_size == 211
        assert events[-1].dtype == "float32"
        yield front
    assert process.returncode == 0


def test_it_gives_what_the_engine_gives_in_process(running: Front, tiny_llama: Path) -> None:
    submits = [greedy(f"g{n}", [5 + n, 17, 42], 12) for n in range(12)]
    wanted = run(open_engine(tiny_llama), submits).tokens
    running.send(*submits)
    found: dict[str, list[int]] = {submit.id: [] for submit in submits}
    for output in running.outputs(finished=12):
        assert output.index == len(found[output.id])
        found[output.id] += output.tokens
    assert found == wanted


def test_a_bad_sequence_is_answered_and_the_others_go_on(running: Front) -> None:
    running.send(greedy("good", [5], 3), greedy("bad", [99999], 3))
    ends = {output.id: output.finish for output in running.outputs(finished=2) if output.finish}
    assert ends == {"bad": "error", "good": "length"}


def test_a_cancelled_sequence_leaves_and_the_load_says_so(running: Front) -> None:
    running.send(Submit("long", [5], [], 400, 0, [], Sampling()))
    running.until(lambda event: isinstance(event, Step) and event.load.running == 1)
    running.send(Cancel("long"))
    *_, last = running.until(lambda event: isinstance(event, Step) and event.load.running == 0)
    assert last.load.free_sequences == 8
    assert not any(output.finish for output in last.outputs)


def test_an_idle_engine_wakes_for_a_command(running: Front) -> None:
    running.send(Cancel("nobody"))
    running.until(lambda event: isinstance(event, Step) and event.load.running == 0)
    running.send(greedy("later", [9], 1))
    assert [output.id for output in running.outputs(finished=1)] == ["later"]


def test_an_engine_ends_when_it_is_told(tiny_llama: Path) -> None:
    with engine(tiny_llama) as (process, front):
        front.until(lambda event: isinstance(event, Ready))
        front.send(greedy("a", [5], 500), Shutdown())
        assert process.wait(WAIT_S) == 0


def test_an_engine_ends_with_its_front_in_the_middle_of_work(tiny_llama: Path) -> None:
    with engine(tiny_llama) as (process, front):
        front.until(lambda event: isinstance(event, Ready))
        front.send(greedy("a", [5], 500))
        front.socket.close()
        assert process.wait(WAIT_S) == 0


def test_an_engine_that_cannot_start_says_why_and_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with engine(tmp_path) as (process, front):
        *_, failed = front.until(lambda event: isinstance(event, Failed))
        assert failed.reason == "MODEL_UNSUPPORTED"
        assert failed.metadata["architecture"] == "mamba"
        assert process.wait(WAIT_S) == 1


def test_a_folder_that_is_wrong_in_an_odd_way_is_a_failed_load(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": "many"}))
    with engine(tmp_path) as (_, front):
        *_, failed = front.until(lambda event: isinstance(event, Failed))
        assert failed.reason == "MODEL_LOAD_FAILED"
        assert "\n" not in failed.message


def test_a_bad_configuration_is_a_line_and_a_status() -> None:
    command = [sys.executable, "-m", "services.worker.engine", "--fd", "0", "--config", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 78
    assert done.stderr.startswith("engine configuration: ")
    assert "model_dir" in done.stderr
