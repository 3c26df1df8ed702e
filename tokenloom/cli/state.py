"""What the launcher writes down about a running mesh, and the lock that says that it lives.

The lock is the truth: the kernel frees it when the launcher ends, however it ends. The file is only
a description, replaced as a whole at each change.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STARTING = "starting"
READY = "ready"
RESTARTING = "restarting"
STOPPED = "stopped"

LOCK_TRIES_MAX = 20
LOCK_TRY_S = 0.01


@dataclass
class Process:
    """One child of the launcher. `ports` has a name for each: `grpc`, `http`, `metrics`, …"""

    name: str
    pid: int
    ports: dict[str, int]
    state: str
    restarts: int = 0


@dataclass
class Mesh:
    """One running mesh. `address` is the public `host:port`."""

    launcher_pid: int
    address: str
    engine: str
    models: list[str]
    otlp: str
    started_unix_ms: int
    processes: list[Process] = field(default_factory=list)

    def process(self, name: str) -> Process | None:
        """The process of this name, or None."""
        return next((p for p in self.processes if p.name == name), None)


def read(path: Path) -> Mesh | None:
    """The description, or None when there is none that can be read."""
    try:
        content = json.loads(path.read_text())
        processes = [Process(**p) for p in content.pop("processes")]
        return Mesh(**content, processes=processes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(path: Path, mesh: Mesh) -> None:
    """Replace the description; readers see the old or the new one, never half."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(dataclasses.asdict(mesh), indent=1) + "\n")
    part.replace(path)


class Locked(Exception):
    """Somebody else holds the lock."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock for the block's length. Raises Locked when somebody else keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _take(descriptor):
            raise Locked(str(path))
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    for _ in range(LOCK_TRIES_MAX):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # `is_locked` holds it for a moment when it looks; a launcher holds it for good.
            time.sleep(LOCK_TRY_S)
    return False


def is_locked(path: Path) -> bool:
    """Whether a launcher lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
