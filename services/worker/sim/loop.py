"""The sim engine's process: commands from a socket, one `Step` back for each step, time that passes.

It ends when the socket does, so no engine outlives its front. Commands are taken between steps only,
as a real engine takes them.
"""

from __future__ import annotations

import socket
import time

from services.worker.link import GONE, FrontLink
from services.worker.protocol import Output, Progress, Submit
from services.worker.sim.config import SimConfig
from services.worker.sim.engine import SimEngine

PROGRESS_EVERY_S = 0.1


class SimLoop:
    """Runs one engine on one connected socket until the socket ends."""

    def __init__(self, sock: socket.socket, config: SimConfig) -> None:
        self._link = FrontLink(sock)
        self._config = config
        self._engine = SimEngine(config)

    def run(self) -> None:
        """Load, then step as long as there is work; returns when the front is gone."""
        try:
            self._load()
            while True:
                self._step()
        except GONE:
            return

    def _load(self) -> None:
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < self._config.load_s:
            self._link.send(Progress("load", passed_s / self._config.load_s))
            self._link.pass_time(min(PROGRESS_EVERY_S, self._config.load_s - passed_s))
        self._link.send(self._engine.ready())

    def _step(self) -> None:
        outputs = self._link.apply(self._submit, self._engine.cancel)
        began_ns = time.monotonic_ns()
        plan = self._engine.plan(began_ns)
        if not plan:
            # Idle: say once what is free now, then sleep until something comes.
            self._link.send(self._engine.tell(outputs))
            self._link.wait()
            return
        self._link.pass_time(self._engine.duration_s(plan))
        now_ns = time.monotonic_ns()
        outputs += self._engine.settle(plan, now_ns)
        self._link.send(self._engine.tell(outputs, now_ns - began_ns, plan.tokens))

    def _submit(self, command: Submit) -> Output | None:
        return self._engine.submit(command, time.monotonic_ns())
