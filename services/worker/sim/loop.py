"""The sim engine's process: commands from a socket, one `Step` back for each step, time that passes.

It ends when the socket does, so no engine outlives its front. Commands are taken between steps only,
as a real engine takes them.
"""

from __future__ import annotations

import select
import socket
import time

from services.worker.protocol import (
    Cancel,
    FrameReader,
    Output,
    Progress,
    Step,
    Submit,
    decode_command,
    encode,
)
from services.worker.sim.config import SimConfig
from services.worker.sim.engine import SimEngine

RECEIVE_BYTES = 1024 * 1024
PROGRESS_EVERY_S = 0.1


class Ended(Exception):
    """The front left, or asked for the end."""


class SimLoop:
    """Runs one engine on one connected socket until the socket ends."""

    def __init__(self, sock: socket.socket, config: SimConfig) -> None:
        self._socket = sock
        self._config = config
        self._engine = SimEngine(config)
        self._reader = FrameReader()
        self._bodies: list[bytes] = []

    def run(self) -> None:
        """Load, then step as long as there is work; returns when the front is gone."""
        try:
            self._load()
            while True:
                self._step()
        except (Ended, BrokenPipeError, ConnectionResetError):
            return

    def _load(self) -> None:
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < self._config.load_s:
            self._socket.sendall(encode(Progress("load", passed_s / self._config.load_s)))
            self._wait(min(PROGRESS_EVERY_S, self._config.load_s - passed_s))
        self._socket.sendall(encode(self._engine.ready()))

    def _step(self) -> None:
        outputs = self._take_commands()
        plan = self._engine.plan(time.monotonic_ns())
        if not plan:
            # Idle: say once what is free now, then sleep until something comes.
            self._socket.sendall(encode(Step(outputs, self._engine.load())))
            while not self._bodies:
                self._receive(None)
            return
        began_s = time.monotonic()
        self._wait(self._engine.duration_s(plan))
        now_ns = time.monotonic_ns()
        outputs += self._engine.settle(plan, now_ns)
        step_ns = now_ns - int(began_s * 1e9)
        self._socket.sendall(encode(Step(outputs, self._engine.load(), step_ns, plan.tokens)))

    def _take_commands(self) -> list[Output]:
        """Apply what came; the outputs of sequences that can never run."""
        self._receive(0)
        bodies, self._bodies = self._bodies, []
        refused: list[Output] = []
        for body in bodies:
            command = decode_command(body)
            if isinstance(command, Submit):
                if (output := self._engine.submit(command, time.monotonic_ns())) is not None:
                    refused.append(output)
            elif isinstance(command, Cancel):
                self._engine.cancel(command.id)
            else:
                raise Ended
        return refused

    def _wait(self, seconds: float) -> None:
        """Let time pass; what comes meanwhile is kept for the next step."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._receive(left_s)

    def _receive(self, timeout_s: float | None) -> None:
        if select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise Ended
            self._bodies += self._reader.feed(data)
