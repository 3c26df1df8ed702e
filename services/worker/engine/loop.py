"""The engine's process: commands from a socket, one `Step` back for each step.

Commands are taken between steps and never waited for while there is work. The process ends when the
socket does, so no engine outlives its front, and when the engine cannot start, after saying why.
"""

from __future__ import annotations

import select
import socket
import time
import traceback

from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.errors import EngineError, load_failed
from services.worker.engine.loader import LoadedModel, load
from services.worker.engine.warmup import warm_up
from services.worker.protocol import (
    Cancel,
    Event,
    Failed,
    FrameReader,
    Output,
    Progress,
    Step,
    Submit,
    decode_command,
    encode,
)

RECEIVE_BYTES = 1024 * 1024


class Ended(Exception):
    """The front left, or asked for the end."""


class EngineLoop:
    """Runs one engine on one connected socket until either ends."""

    def __init__(self, sock: socket.socket, config: EngineConfig) -> None:
        self._socket = sock
        self._config = config
        self._reader = FrameReader()
        self._bodies: list[bytes] = []

    def run(self) -> bool:
        """Whether the engine came as far as being ready."""
        try:
            engine = self._start()
            while True:
                self._turn(engine)
        except EngineError as error:
            self._send(Failed(error.reason, error.message, error.metadata))
            return False
        except (Ended, BrokenPipeError, ConnectionResetError):
            return True

    def _start(self) -> Engine:
        self._send(Progress("start", 0.0))
        loaded = self._load()
        engine = Engine(loaded, self._config, time.monotonic_ns)
        self._send(Progress("warm-up", 0.9))
        warm_up(engine)
        self._send(engine.ready())
        return engine

    def _load(self) -> LoadedModel:
        try:
            return load(self._config, lambda stage, fraction: self._send(Progress(stage, fraction)))
        except (EngineError, ConnectionError):
            raise
        except Exception as error:
            # Libraries raise anything for a folder that is wrong in a way nobody thought of.
            traceback.print_exc()
            raise load_failed(f"{type(error).__name__}: {error}") from error

    def _turn(self, engine: Engine) -> None:
        """One step, or, when there is nothing to do, the load once and then a wait for commands."""
        refused = self._take_commands(engine)
        if not engine.idle:
            step = engine.step()
            self._send(Step([*refused, *step.outputs], step.load, step.step_ns, step.step_tokens))
            return
        self._send(Step(refused, engine.load()))
        while not self._bodies:
            self._receive(None)

    def _take_commands(self, engine: Engine) -> list[Output]:
        """Applies what came; the outputs of sequences that end at once."""
        self._receive(0)
        bodies, self._bodies = self._bodies, []
        refused: list[Output] = []
        for body in bodies:
            command = decode_command(body)
            if isinstance(command, Submit):
                if (output := engine.submit(command)) is not None:
                    refused.append(output)
            elif isinstance(command, Cancel):
                engine.cancel(command.id)
            else:
                raise Ended
        return refused

    def _receive(self, timeout_s: float | None) -> None:
        if select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise Ended
            self._bodies += self._reader.feed(data)

    def _send(self, event: Event) -> None:
        self._socket.sendall(encode(event))
