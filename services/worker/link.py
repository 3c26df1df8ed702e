"""The engine's end of the socket between it and its front: commands in, events out.

Commands are kept until they are asked for, between two steps. Nothing here computes, so that every kind
of engine can use it. Who does not look at the socket for long is watched by a thread, for `ends_with_front`.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.worker.protocol import Cancel, Event, FrameReader, Output, Submit, decode_command, encode

RECEIVE_BYTES = 1024 * 1024
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
EXIT_ORPHAN = 1


class Ended(Exception):
    """The front left, or asked for the end."""


GONE = (Ended, BrokenPipeError, ConnectionResetError)
"""What every call here may raise when there is no front any more."""


class FrontLink:
    """One connected socket. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = FrameReader()
        self._bodies: list[bytes] = []

    def send(self, event: Event) -> None:
        """Waits as long as the front does not read."""
        self._socket.sendall(encode(event))

    @contextmanager
    def ends_with_front(self) -> Iterator[None]:
        """As long as the block lasts, this process ends with its front, though nobody looks at the socket.

        At once and without any clean-up: a model on its way to a device holds memory that another needs.
        """
        stop, stopping = os.pipe()
        watching = threading.Thread(target=_watch, args=(self._socket.fileno(), stop), daemon=True)
        watching.start()
        try:
            yield
        finally:
            os.close(stopping)
            watching.join()
            os.close(stop)

    def apply(self, submit: Callable[[Submit], Output | None], cancel: Callable[[str], None]) -> list[Output]:
        """Hands over all commands that came; the outputs of sequences that end at once."""
        self._receive(0)
        bodies, self._bodies = self._bodies, []
        refused: list[Output] = []
        for body in bodies:
            command = decode_command(body)
            if isinstance(command, Submit):
                if (output := submit(command)) is not None:
                    refused.append(output)
            elif isinstance(command, Cancel):
                cancel(command.id)
            else:
                raise Ended
        return refused

    def wait(self) -> None:
        """Returns when there is a command."""
        while not self._bodies:
            self._receive(None)

    def pass_time(self, seconds: float) -> None:
        """Returns after so long; what comes meanwhile is kept."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._receive(left_s)

    def _receive(self, timeout_s: float | None) -> None:
        if select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise Ended
            self._bodies += self._reader.feed(data)


def _watch(front: int, stop: int) -> None:
    """Until `stop` is closed at its other end, or the front is gone."""
    poll = select.poll()
    poll.register(front, HUNG_UP)
    poll.register(stop, select.POLLIN)
    if all(fd != stop for fd, _ in poll.poll()):
        os._exit(EXIT_ORPHAN)
