"""`tokenloom up`, in the foreground or detached, and `tokenloom down`."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from tokenloom.cli import local, state
from tokenloom.cli.errors import CliError
from tokenloom.cli.launcher import Report, already_running, check_envoy, check_port, run
from tokenloom.cli.plan import Options, environment
from tokenloom.cli.processes import roll
from tokenloom.cli.supervisor import Event, last_lines
from tokenloom.cli.view import StartupView

LAUNCHER_LOG = "launcher.log"
DOWN_MAX_S = 30.0
"""How long a launcher may take to end its children; then it is killed, and they with it."""


def in_foreground(options: Options, console: Console) -> None:
    """Run until a signal. Raises CliError."""
    with StartupView(console) as view:
        asyncio.run(run(options, view.on_event))
    console.print("the mesh is down")


def detached(options: Options, console: Console) -> None:
    """Start a launcher of its own session; return when the mesh is up. Raises CliError."""
    if state.is_locked(local.lock_file()):
        raise CliError(already_running())
    check_envoy()
    check_port(options)
    log = local.logs_dir() / LAUNCHER_LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    roll(log)
    with _launcher(options, log) as (process, reports), StartupView(console) as view:
        failure = _follow(reports, view, process)
    if failure or not view.up:
        process.wait()
        raise CliError(failure or f"the launcher ended early; its log {log} ends:\n{last_lines(log, 3)}")


@contextmanager
def _launcher(options: Options, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO]]:
    """The detached launcher, and the pipe on which it says what happens until the mesh is up."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "tokenloom.cli", "up", "--report-fd", str(writing)]
    command += ["--workers", str(options.workers), "--engine", options.engine]
    command += ["--port", str(options.port), "--host", options.host]
    command += ["--trace-ratio", str(options.trace_ratio)]
    command += [part for model in options.models for part in ("--model", model)]
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=environment(os.environ),
            start_new_session=True,
            pass_fds=[writing],
        )
    os.close(writing)
    with os.fdopen(reading, "rb") as reports:
        yield process, reports


def _follow(reports: BinaryIO, view: StartupView, process: subprocess.Popen[bytes]) -> str:
    """Show events until the mesh is up; what went wrong, or an empty string."""
    try:
        for line in reports:
            event = Event(**json.loads(line))
            if event.kind == "error":
                return event.detail
            view.on_event(event)
            if view.up:
                return ""
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        return "stopped before the mesh was up"
    return ""


def for_parent(options: Options, report_fd: int, console: Console) -> None:
    """The detached launcher itself: events go to the parent until it stops listening, and to the log."""
    pipe = os.fdopen(report_fd, "wb", buffering=0)
    os.set_inheritable(report_fd, False)
    view = StartupView(console)
    report = _to_both(pipe, view)
    try:
        asyncio.run(run(options, report))
    except CliError as error:
        report(Event("error", "mesh", detail=str(error)))
        raise


def _to_both(pipe: BinaryIO, view: StartupView) -> Report:
    open_pipe: list[BinaryIO] = [pipe]

    def report(event: Event) -> None:
        if event.kind != "error":
            view.on_event(event)
        if open_pipe:
            try:
                open_pipe[0].write(json.dumps(event.to_dict()).encode() + b"\n")
            except BrokenPipeError:
                open_pipe.clear()
            if event.kind == "up":
                open_pipe.clear()
                pipe.close()

    return report


def down(console: Console) -> bool:
    """Stop the mesh; False when none runs."""
    mesh = local.running()
    if mesh is None:
        if state.is_locked(local.lock_file()):
            raise CliError("a mesh is just starting: try again in a moment")
        return False
    try:
        launcher = os.pidfd_open(mesh.launcher_pid)
    except ProcessLookupError:
        return False
    try:
        signal.pidfd_send_signal(launcher, signal.SIGTERM)
        if not select.select([launcher], [], [], DOWN_MAX_S)[0]:
            console.print(f"the launcher did not end within {DOWN_MAX_S:.0f} s: killing it", style="red")
            signal.pidfd_send_signal(launcher, signal.SIGKILL)
            select.select([launcher], [], [], DOWN_MAX_S)
            local.state_file().unlink(missing_ok=True)
    finally:
        os.close(launcher)
    return True
