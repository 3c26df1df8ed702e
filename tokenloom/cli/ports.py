"""Which ports the local mesh takes, and who holds one that is taken.

Ports come from below the range that outgoing connections use, so that a process which dies can have
its port again: an outgoing connection never sits on it meanwhile.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

FIRST_PORT = 20_000
LAST_PORT = 32_000
TRIES_MAX = 4_000


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a listener could be bound to host:port now."""
    probe = _bound(host, port)
    if probe is None:
        return False
    probe.close()
    return True


def free_ports(count: int, rng: random.Random, taken: Iterable[int] = ()) -> list[int]:
    """`count` different free ports on loopback, none of `taken`.

    All are held at once while they are chosen. Raises OSError when there are not enough.
    """
    held: dict[int, socket.socket] = {}
    refused = set(taken)
    try:
        for _ in range(TRIES_MAX):
            if len(held) == count:
                break
            port = rng.randint(FIRST_PORT, LAST_PORT)
            if port in held or port in refused:
                continue
            if (probe := _bound("127.0.0.1", port)) is None:
                refused.add(port)
            else:
                held[port] = probe
        if len(held) < count:
            raise OSError(f"no {count} free ports between {FIRST_PORT} and {LAST_PORT}")
        return list(held)
    finally:
        for probe in held.values():
            probe.close()


def holder(port: int) -> str:
    """`name (pid n)` of the process that listens on `port`, or an empty string when it cannot be seen."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for folder in Path("/proc").glob("[0-9]*"):
        if wanted and wanted.intersection(_open_files(folder)):
            return f"{_first_line(folder / 'comm')} (pid {folder.name})"
    return ""


def _open_files(process: Path) -> Iterator[str]:
    """What a process has open; nothing for another user's, or one that has just ended."""
    try:
        links = list((process / "fd").iterdir())
    except OSError:
        return
    for link in links:
        try:
            yield str(link.readlink())
        except OSError:
            continue


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(fields[9])
    return found


def _bound(host: str, port: int) -> socket.socket | None:
    # SO_REUSEADDR: a port whose last connections only linger is free, as it is for every server.
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)
    except OSError:
        probe.close()
        return None
    return probe
