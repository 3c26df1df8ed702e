"""A slow network on one machine: `python -m tools.bench_fetch_net TARGET_PORT BYTES_PER_S` relays a port.

Prints its own port. What comes back from the target passes at BYTES_PER_S, all connections together; requests
pass at once. Bytes go from socket to socket in the kernel, so that the network takes little of the CPUs.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

PIECE_BYTES = 64 * 1024
BURST_S = 0.02
"""As much may pass at once after a pause."""


class _Wire:
    """When the next bytes may pass."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = time.monotonic()
        self._lock = threading.Lock()

    def carry(self, count: int) -> None:
        """Returns when they are through."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic() - BURST_S) + count / self._bytes_per_s
            wait_s = self._free_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


def _relay(source: socket.socket, target: socket.socket, wire: _Wire | None) -> None:
    out, into = os.pipe()
    try:
        while count := os.splice(source.fileno(), into, PIECE_BYTES):
            if wire:
                wire.carry(count)
            while count:
                count -= os.splice(out, target.fileno(), count)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One side is gone: let the other know.
        for end in (source, target):
            end.close()
    finally:
        os.close(out)
        os.close(into)


def main() -> None:
    """Relays until it is killed."""
    port, wire = int(sys.argv[1]), _Wire(float(sys.argv[2]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            client, _ = server.accept()
            upstream = socket.create_connection(("127.0.0.1", port))
            for end in (client, upstream):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pair in ((client, upstream, None), (upstream, client, wire)):
                threading.Thread(target=_relay, args=pair, daemon=True).start()


if __name__ == "__main__":
    main()
