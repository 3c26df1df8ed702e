"""A whole mesh for a test: every process of `tokenloom up`, in a home folder of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

from tokenloom.cli import state

ROOT = Path(__file__).resolve().parents[2]
TOKENLOOM = Path(sys.executable).with_name("tokenloom")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], what: str, timeout_s: float = 30) -> object:
    """Poll for something that another process does. Raises AssertionError naming it."""
    give_up = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)


async def eventually(condition: Callable[[], Awaitable[object]], what: str, timeout_s: float = 30) -> object:
    """As `until`, for something that is asked over the network."""
    give_up = time.monotonic() + timeout_s
    while True:
        value = await condition()
        if value:
            return value
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(0.02)


class Mesh:
    """One mesh under `home`, driven through the command line; its processes are found in its own file."""

    def __init__(self, home: Path, **environ: str) -> None:
        self.home = home
        self.port = free_port()
        self.environ = {
            **os.environ,
            "TOKENLOOM_HOME": str(home),
            "NO_COLOR": "1",
            "COLUMNS": "160",
            **environ,
        }

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.target}"

    def run(self, *args: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """One `tokenloom …` command, whatever its status."""
        return subprocess.run(
            [TOKENLOOM, *args],
            env=self.environ,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ok(self, *args: str, timeout_s: float = 180) -> str:
        """One command that must succeed; its standard output."""
        done = self.run(*args, timeout_s=timeout_s)
        assert done.returncode == 0, (
            f"tokenloom {' '.join(args)}:\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def up(self, *args: str) -> Mesh:
        self.ok("up", "--detach", "--port", str(self.port), *args)
        return self

    def down(self) -> None:
        self.ok("down")

    def status(self) -> dict[str, dict[str, object]]:
        """Each process of the mesh by its name."""
        return {p["name"]: p for p in json.loads(self.ok("status", "--json"))["processes"]}

    def _process(self, name: str) -> state.Process:
        """As the launcher last wrote it down: a command for each look would take the cores from the mesh."""
        mesh = state.read(self.home / "mesh.json")
        assert mesh is not None
        found = mesh.process(name)
        assert found is not None, name
        return found

    def pid(self, name: str) -> int:
        return self._process(name).pid

    def port_of(self, name: str, kind: str) -> int:
        return self._process(name).ports[kind]

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal one process; its pid before."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def ready(self) -> Mesh:
        """Wait until every process is ready again."""
        until(lambda: all(p["state"] == "ready" for p in self.status().values()), "every process ready", 60)
        return self

    def envoy_stat(self, part: str) -> int:
        """The sum of Envoy's counters whose name contains `part`."""
        admin = self.port_of("envoy", "admin")
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/stats?filter={part}", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(int(line.rsplit(": ", 1)[1]) for line in lines if line.rsplit(": ", 1)[-1].isdigit())

    def logs(self, lines: int = 15) -> str:
        """The end of every log, for a failed assertion."""
        parts = []
        for path in sorted(self.home.rglob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)
