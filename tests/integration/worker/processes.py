"""Looking at processes from outside: engines are the children of a front."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path


def engines_of(front_pid: int | None = None, kind: str = "services.worker.sim") -> list[int]:
    """Process ids of the engines that a front (default: this process) started and that still run."""
    found = []
    for task in Path(f"/proc/{front_pid or os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            command = _read(f"/proc/{pid}/cmdline")
            if kind in command:
                found.append(int(pid))
    return found


def is_running(pid: int) -> bool:
    """False for what is gone, and for what waits to be buried."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def libraries_of(pid: int) -> str:
    """Every file that a process has mapped."""
    return _read(f"/proc/{pid}/maps")


def memory_of(pid: int) -> int:
    """Bytes of its proportional set: shared pages counted by the share; 0 for a process that is gone."""
    lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """For what no event tells: the state of other processes and of files."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
