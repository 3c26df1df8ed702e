"""The life of a local mesh, from the lock to the last process that ends.

`run` is what `tokenloom up` does in the foreground; with `--detach` it does the same in a session of
its own. What happens is told to `report`, and the state file always says what runs.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloom.cli import envoy, local, ports, state
from tokenloom.cli.catalog import Chosen, models_to_load
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_preload import preload
from tokenloom.cli.models_workers import workers_of
from tokenloom.cli.otlp import Receiver
from tokenloom.cli.plan import Options, Plan, Ports
from tokenloom.cli.processes import raise_file_limit
from tokenloom.cli.supervisor import Event, StartFailed, Supervisor

STOPPED_FIRST = ("envoy",)
"""The door closes first: what is in flight is then cancelled, and the rest has nothing to wait for."""

MODELS = "models"
"""Whose events are not those of a process."""
WILDCARDS = ("0.0.0.0", "::")

Report = Callable[[Event], None]


async def run(options: Options, report: Report) -> None:
    """Run a mesh until a signal ends it. Raises CliError when it cannot start."""
    try:
        with state.lock(local.lock_file()):
            await Launcher(options, report).run()
    except state.Locked:
        raise CliError(already_running()) from None


def already_running() -> str:
    """Why there is no second mesh."""
    mesh = state.read(local.state_file())
    where = f" at {mesh.address} (launcher pid {mesh.launcher_pid})" if mesh else ""
    return (
        f"a mesh is already running{where}: stop it with `tokenloom down`, or set TOKENLOOM_HOME for another"
    )


def check_port(options: Options) -> None:
    """Raises CliError when the public port is taken."""
    if not ports.is_free(options.port, options.host):
        by = ports.holder(options.port)
        who = f" by {by}" if by else ""
        raise CliError(f"port {options.port} is in use{who}: stop it, or choose another with --port")


def check_envoy() -> Path:
    """The Envoy binary. Raises CliError when there is none."""
    binary = envoy.find_binary()
    if binary is None:
        raise CliError(f"no Envoy at {envoy.ROOT / '.tools' / 'envoy'} or on PATH: run `make install`")
    return binary


class Launcher:
    """One mesh and its parts."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options = options
        self._outer_report = report
        self._supervisor = Supervisor(local.logs_dir(), self._on_event)
        self._mesh: state.Mesh | None = None

    async def run(self) -> None:
        binary = check_envoy()
        check_port(self.options)
        for folder in (local.logs_dir(), local.store_dir(), local.cache_dir()):
            folder.mkdir(parents=True, exist_ok=True)
        raise_file_limit()
        receiver = Receiver(local.traces_file())
        stop, hurry = asyncio.Event(), asyncio.Event()
        self._listen_for_signals(stop, hurry)
        try:
            up = asyncio.create_task(self._up(binary, receiver))
            if await _unless(stop, up):
                self._outer_report(Event("up", "mesh", os.getpid(), self._address()))
                await stop.wait()
        finally:
            await _unless(hurry, asyncio.create_task(self._supervisor.stop(STOPPED_FIRST)))
            self._supervisor.kill()
            await receiver.close()
            local.state_file().unlink(missing_ok=True)

    async def _up(self, binary: Path, receiver: Receiver) -> None:
        """Everything started and ready."""
        chosen = Ports.choose(self.options, random.Random())
        await receiver.start(chosen.otlp)
        cpus = len(os.sched_getaffinity(0))
        plan = Plan(self.options, chosen, dict(os.environ), local.store_dir(), local.cache_dir(), cpus)
        self._mesh = state.Mesh(
            launcher_pid=os.getpid(),
            address=self._address(),
            engine=self.options.engine,
            models=[],
            otlp=f"{envoy.LOOPBACK}:{chosen.otlp}",
            started_unix_ms=time.time_ns() // 1_000_000,
        )
        try:
            await self._supervisor.start([plan.modelstore()])
            target = f"{envoy.LOOPBACK}:{chosen.modelstore['grpc']}"
            models = await models_to_load(target, self.options.engine, self.options.models)
            self._mesh.models = [*models.served]
            bootstrap = envoy.write(
                local.envoy_dir(),
                plan.envoy_ports(),
                plan.endpoints(),
                trace_ratio=self.options.trace_ratio,
            )
            command = envoy.command(binary, bootstrap, concurrency=plan.envoy_concurrency())
            await self._supervisor.start(plan.serving(models.required, command))
        except StartFailed as error:
            raise CliError(str(error)) from None
        if models.first:
            await self._preload(self._mesh, models)

    async def _preload(self, mesh: state.Mesh, models: Chosen) -> None:
        """Load the first models, and tell what came of it. Raises CliError when none could be loaded."""
        began_s = time.monotonic()
        self._outer_report(Event("waiting", MODELS, detail=f"loading {', '.join(models.first)}"))
        done = await preload(workers_of(mesh), models.first)
        if not done.resident:
            raise CliError("; ".join(done.failures) or "the workers have no room for any of the models")
        seconds = time.monotonic() - began_s
        self._outer_report(Event("loaded", MODELS, detail=", ".join(done.resident), seconds=seconds))
        for failure in done.failures:
            self._outer_report(Event("note", MODELS, detail=failure))
        if later := [name for name in models.served if name not in done.resident]:
            on_demand = f"loaded when they are asked for: {', '.join(later)}"
            self._outer_report(Event("note", MODELS, detail=on_demand))

    def _address(self) -> str:
        """Where callers on this machine find the mesh."""
        host = envoy.LOOPBACK if self.options.host in WILDCARDS else self.options.host
        return f"{host}:{self.options.port}"

    def _on_event(self, event: Event) -> None:
        if self._mesh is not None:
            self._mesh.processes = [child.describe() for child in self._supervisor.children]
            state.write(local.state_file(), self._mesh)
        self._outer_report(event)

    def _listen_for_signals(self, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)


async def _unless(event: asyncio.Event, task: asyncio.Task[Any]) -> bool:
    """Wait for `task`; whether it ended before `event`, which cancels it."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False
    task.result()
    return True
