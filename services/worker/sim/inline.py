"""A sim engine on the front's own event loop, behind the same port as an engine process.

It behaves as `loop.py` does, with a timer in place of a sleep and calls in place of a socket: commands
are taken between steps only, one message follows each step, and an idle engine says once what is free.
A hundred of them fit in one process, which is what it is for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from services.worker.front.ports import EngineLink, ModelVersion
from services.worker.front.reservation import Reservation
from services.worker.protocol import Cancel, Command, Event, Output, Shutdown, Submit
from services.worker.sim.config import SimConfig
from services.worker.sim.engine import SimEngine

LATE_MAX_S = 0.05
"""A step that begins later than this after the one before begins anew: there was nothing to do, or the
loop cannot keep up."""

OnEvent = Callable[[Event], None]


class InlineEngines:
    """`Engines` of one pretended device; `config` makes a model's."""

    def __init__(self, config: Callable[[ModelVersion], SimConfig]) -> None:
        self._config = config

    def reserve(self, version: ModelVersion, budget_bytes: int, *, whole: bool) -> Reservation:
        """Nothing: it has neither a process nor weights."""
        return Reservation()

    def launcher(self, version: ModelVersion, reservation: Reservation) -> InlineLaunch:
        """How to start this version's engine."""
        return InlineLaunch(self._config(version))


class InlineLaunch:
    """Starts one engine here; it reads no files and loads at once."""

    def __init__(self, config: SimConfig) -> None:
        self._config = config

    async def __call__(self, folder: str, on_event: OnEvent) -> EngineLink:
        """Its first event comes after this has returned, as from a process."""
        return InlineEngine(self._config, on_event)


class InlineEngine:
    """The `EngineLink` of one engine."""

    def __init__(self, config: SimConfig, on_event: OnEvent) -> None:
        self._engine = SimEngine(config)
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._commands: list[Submit | Cancel] = []
        self._timer: asyncio.Handle = self._loop.call_soon(self._ready)
        self._stepping = True
        self._free_s = 0.0
        """When the step before was over by its law, on the loop's clock."""
        self.ended: asyncio.Future[str] = self._loop.create_future()

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def send(self, command: Command) -> bool:
        """Kept until the next step; False once it has ended."""
        if self.ended.done():
            return False
        if isinstance(command, Shutdown):
            self.kill()
            return True
        self._commands.append(command)
        if not self._stepping:
            self._stepping = True
            self._timer = self._loop.call_soon(self._step)
        return True

    def kill(self) -> None:
        """End it now. Harmless when it has ended."""
        self._timer.cancel()
        if not self.ended.done():
            self.ended.set_result("it was ended")

    def _ready(self) -> None:
        self._on_event(self._engine.ready())
        self._step()

    def _step(self) -> None:
        """Take the commands and begin a step; its results come when its time has passed."""
        began_ns = time.monotonic_ns()
        refused = self._apply(began_ns)
        plan = self._engine.plan(began_ns)
        if not plan:
            self._stepping = False
            self._on_event(self._engine.tell(refused))
            return

        # From when the last step should have ended, not from when the loop came round to it: else all the
        # engines that were late together would step together from then on.
        now_s = self._loop.time()
        begins_s = self._free_s if now_s - self._free_s < LATE_MAX_S else now_s
        self._free_s = begins_s + self._engine.duration_s(plan)

        def settle() -> None:
            now_ns = time.monotonic_ns()
            outputs = refused + self._engine.settle(plan, now_ns)
            self._on_event(self._engine.tell(outputs, now_ns - began_ns, plan.tokens))
            if not self.ended.done():
                self._step()

        self._timer = self._loop.call_at(self._free_s, settle)

    def _apply(self, now_ns: int) -> list[Output]:
        """Hand over what came; the outputs of sequences that can never run."""
        commands, self._commands = self._commands, []
        refused: list[Output] = []
        for command in commands:
            if isinstance(command, Cancel):
                self._engine.cancel(command.id)
            elif (output := self._engine.submit(command, now_ns)) is not None:
                refused.append(output)
        return refused
