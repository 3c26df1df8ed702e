"""Keeps a set of processes alive: starts them, waits for readiness, restarts what dies, stops them all.

It knows nothing of models or Envoy. What happens is told to `report`; nothing is printed here.
Bounds: a first start may die `EARLY_DEATHS_MAX` times and take `READY_MAX_S`, unless the child says before
that it has given up; later a child that dies is started again for ever, on its own ports, with a bounded
delay between.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenloom.cli import state
from tokenloom.cli.processes import Backoff, Spec, probe, roll, signal_group, signal_one, spawn

EARLY_DEATHS_MAX = 3
READY_MAX_S = 900.0
READY_POLL_S = 0.05
STOP_GRACE_S = 8.0
ROLL_INTERVAL_S = 10.0
EXIT_SETTINGS = 78
"""A service that refuses its settings exits so: starting again will not help."""
FAILED = "failed: "
"""So begins what a child says that is not ready and has given up."""
LOG_TAIL_LINES = 3
TAIL_BYTES_MAX = 256 * 1024


@dataclass(frozen=True)
class Event:
    """`kind`: started, waiting, ready, died, failed; of a mesh also loaded, note, up, error."""

    kind: str
    name: str
    pid: int = 0
    detail: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class StartFailed(Exception):
    """A process did not become ready; the message is one line with the end of its log."""


class Child:
    """One supervised process."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.process: asyncio.subprocess.Process | None = None
        self.state = state.STARTING
        self.restarts = 0
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.deaths_in_a_row = 0
        self.born_s = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def describe(self) -> state.Process:
        """As it stands in the state file."""
        return state.Process(self.spec.name, self.pid, dict(self.spec.ports), self.state, self.restarts)


class Supervisor:
    """`report` hears every event, after `children` shows what it tells."""

    def __init__(self, logs: Path, report: Callable[[Event], None], backoff: Backoff | None = None) -> None:
        self.children: list[Child] = []
        self._logs = logs
        self._report = report
        self._backoff = backoff or Backoff()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, specs: Iterable[Spec]) -> None:
        """Start all at once; return when all are ready. Raises StartFailed for the first that fails."""
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._roll_logs()))
        fresh = [Child(spec, self._logs / f"{spec.name}.log") for spec in specs]
        self.children += fresh
        self._tasks += [asyncio.create_task(self._keep(child)) for child in fresh]
        await asyncio.gather(*(child.first_ready for child in fresh))

    async def stop(self, first: Sequence[str] = ()) -> None:
        """End everything, those named `first` before the others; nothing is left when it returns."""
        self._stopping = True
        early = [c for c in self.children if c.spec.name in first]
        await self._end(early, signal.SIGTERM)
        await self._end(self.children, signal.SIGTERM)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in self.children:
            child.state = state.STOPPED
            # What a child started and left behind is in its group.
            if child.pid:
                signal_group(child.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End everything now."""
        self._stopping = True
        for child in self.children:
            if child.pid:
                signal_group(child.pid, signal.SIGKILL)

    async def _end(self, children: Sequence[Child], number: signal.Signals) -> None:
        living = [c.process for c in children if c.process is not None and c.process.returncode is None]
        for process in living:
            signal_one(process, number)
        waits = [asyncio.create_task(process.wait()) for process in living]
        if not waits:
            return
        _, late = await asyncio.wait(waits, timeout=STOP_GRACE_S)
        if late:
            for process in living:
                if process.returncode is None:
                    signal_group(process.pid, signal.SIGKILL)
            await asyncio.wait(late)

    async def _keep(self, child: Child) -> None:
        try:
            while not self._stopping:
                await self._live_once(child)
                if self._stopping:
                    return
                if not child.first_ready.done() and self._hopeless(child):
                    return
                await asyncio.sleep(self._backoff.delay_s(child.deaths_in_a_row))
                child.restarts += 1
        except OSError as error:
            self._fail(child, f"{child.spec.name} cannot be started: {error}")

    async def _live_once(self, child: Child) -> None:
        """From one start of the process to its end."""
        loop = asyncio.get_running_loop()
        child.born_s = loop.time()
        child.process = await spawn(child.spec, child.log)
        child.state = state.STARTING
        self._tell("started", child)
        waiting = asyncio.create_task(self._await_ready(child))
        try:
            status = await child.process.wait()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        signal_group(child.process.pid, signal.SIGKILL)
        lived_s = loop.time() - child.born_s
        child.deaths_in_a_row = 1 if lived_s >= self._backoff.steady_s else child.deaths_in_a_row + 1
        child.state = state.RESTARTING
        if not self._stopping:
            delay_s = self._backoff.delay_s(child.deaths_in_a_row)
            self._tell("died", child, describe_status(status), delay_s)

    async def _await_ready(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        said = ""
        while True:
            ready, what = await probe(child.spec.ports["metrics"])
            if ready:
                break
            if what != said:
                said = what
                self._tell("waiting", child, what)
            if not child.first_ready.done() and what.startswith(FAILED):
                self._fail(
                    child, f"{child.spec.name} gave up: {what.removeprefix(FAILED)}; its log is {child.log}"
                )
            if not child.first_ready.done() and loop.time() - child.born_s > READY_MAX_S:
                self._fail(child, f"{child.spec.name} was not ready after {READY_MAX_S:.0f} s: {what}")
            await asyncio.sleep(READY_POLL_S)
        child.state = state.READY
        self._tell("ready", child, seconds=loop.time() - child.born_s)
        if not child.first_ready.done():
            child.first_ready.set_result(None)

    def _hopeless(self, child: Child) -> bool:
        assert child.process is not None
        status = child.process.returncode or 0
        if status != EXIT_SETTINGS and child.deaths_in_a_row < EARLY_DEATHS_MAX:
            return False
        tail = last_lines(child.log, LOG_TAIL_LINES)
        why = f"{child.spec.name} ended with {describe_status(status)} before it was ready"
        self._fail(child, f"{why}; its log {child.log} ends:\n{tail}")
        return True

    def _fail(self, child: Child, message: str) -> None:
        child.state = state.STOPPED
        self._tell("failed", child, message)
        if not child.first_ready.done():
            child.first_ready.set_exception(StartFailed(message))

    def _tell(self, kind: str, child: Child, detail: str = "", seconds: float = 0.0) -> None:
        self._report(Event(kind, child.spec.name, child.pid, detail, seconds))

    async def _roll_logs(self) -> None:
        while True:
            await asyncio.sleep(ROLL_INTERVAL_S)
            for child in self.children:
                await asyncio.to_thread(roll, child.log)


def describe_status(status: int) -> str:
    """`exit status 1`, or `signal SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def last_lines(path: Path, count: int) -> str:
    """The end of a text file; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES_MAX))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])
