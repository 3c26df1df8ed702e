"""`tokenloom logs`: the ends of the log files, and what is added to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenloom.cli import local
from tokenloom.cli.errors import CliError
from tokenloom.cli.supervisor import last_lines

POLL_S = 0.2
CHUNK_BYTES_MAX = 1024 * 1024


def files(name: str | None) -> list[Path]:
    """The log files asked for. Raises CliError naming those that exist."""
    folder = local.logs_dir()
    found = sorted(folder.glob("*.log"))
    if name is None:
        if not found:
            raise CliError(f"no logs in {folder} yet: start a mesh with `tokenloom up`")
        return found
    chosen = [path for path in found if path.stem == name]
    if not chosen:
        there = ", ".join(path.stem for path in found) or "none yet"
        raise CliError(f"no log named {name!r}; there are: {there}")
    return chosen


def tail(paths: list[Path], lines: int) -> Iterator[str]:
    """The last lines of each file, with its name in front when there are several."""
    for path in paths:
        for line in last_lines(path, lines).splitlines():
            yield prefixed(path, line, len(paths) > 1)


def prefixed(path: Path, line: str, several: bool) -> str:
    """One line as it is shown."""
    return f"{path.stem:<12} {line}" if several else line


class Follower:
    """What is added to one file, whole lines only; a file that was cut short is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size
        self._rest = b""

    def fresh(self) -> list[str]:
        """Lines completed since the last call."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset, self._rest = 0, b""
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(CHUNK_BYTES_MAX)
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


def follow(paths: list[Path], write: Callable[[str], None]) -> None:
    """Write what is added until interrupted."""
    followers = [Follower(path) for path in paths]
    while True:
        for follower in followers:
            for line in follower.fresh():
                write(prefixed(follower.path, line, len(paths) > 1))
        time.sleep(POLL_S)
