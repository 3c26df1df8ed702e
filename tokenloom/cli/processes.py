"""One child process: how it is started so that it never outlives the launcher, stopped, and probed."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
LOG_BYTES_MAX = 16 * 1024 * 1024
"""A log that is longer is moved aside, to `<name>.log.1`."""
PROBE_BYTES_MAX = 4096


@dataclass(frozen=True)
class Spec:
    """What to run. `ports["metrics"]` answers `/readyz`."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    ports: Mapping[str, int]


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a child that died is started again."""

    first_s: float = 0.1
    max_s: float = 5.0
    steady_s: float = 10.0
    """A child that ran this long starts again as if it had never died."""

    def delay_s(self, deaths_in_a_row: int) -> float:
        """Doubles from `first_s` up to `max_s`. `deaths_in_a_row` counts from 1."""
        return min(self.max_s, self.first_s * 2.0 ** min(deaths_in_a_row - 1, 30))


async def spawn(spec: Spec, log: Path) -> asyncio.subprocess.Process:
    """Start it in a process group of its own, its output appended to `log`.

    Must be called from the main thread: the kernel ties the child's life to the thread that made it.
    """
    roll(log)
    with log.open("ab", buffering=0) as sink:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(GUARD), str(os.getpid())),
            *spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=dict(spec.env),
            process_group=0,
        )


def roll(log: Path) -> None:
    """Set aside a log that has grown too long; copied, not moved, since its writer has it open."""
    try:
        if log.stat().st_size <= LOG_BYTES_MAX:
            return
        log.with_name(log.name + ".1").write_bytes(log.read_bytes())
        os.truncate(log, 0)
    except FileNotFoundError:
        return


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a child and whatever it started; one that has ended is no error."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def signal_one(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signal the child alone, so that it can end what it started in its own way."""
    if process.returncode is None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            pass


async def probe(port: int, path: str = "/readyz", timeout_s: float = 2.0) -> tuple[bool, str]:
    """Whether a child says that it is ready, and what it says."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = await reader.read(PROBE_BYTES_MAX)
                while answer and (more := await reader.read(PROBE_BYTES_MAX)):
                    answer = (answer + more)[:PROBE_BYTES_MAX]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False, "starting"
    head, _, body = answer.decode("utf-8", "replace").partition("\r\n\r\n")
    ready = head.split(" ", 2)[1:2] == ["200"]
    lines = body.strip().splitlines()
    return ready, lines[0] if lines else "no answer"


def raise_file_limit() -> None:
    """Every open stream is a descriptor: use as many as the machine allows, children too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def children_of(pid: int) -> list[int]:
    """Direct children of a process, as the kernel lists them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return sorted(found)


def program_of(pid: int) -> str:
    """The program, or the module that Python runs: `services.worker.engine`. Empty when it has ended."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    words = [word.decode("utf-8", "replace") for word in raw.split(b"\0") if word]
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return Path(words[0]).name if words else ""
