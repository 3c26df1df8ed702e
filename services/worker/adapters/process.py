"""One engine process: started by exec with a socket, watched until it is gone, never forked from gRPC.

The socket's end and the process's end are noticed apart: an engine that closed its socket but lives on
is killed after `LINGER_S`, and one that died while a child of its own holds the socket is still buried.
What it writes to standard output and error goes to this process's log.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, cast

import msgspec

from services.worker.front.ports import EngineLink
from services.worker.protocol import Command, Event, FrameReader, Submit, decode_event, encode
from tokenloom.kit.logs import get_logger

LINGER_S = 1.0
OUTBOX_BYTES_MAX = 64 * 1024 * 1024
"""Unsent commands beyond which no sequence is submitted any more."""
LAST_WORDS_S = 0.2
"""For what it wrote before it ended, on its socket and on its output."""
LAST_WORDS_CHARS = 200
LINE_CHARS_MAX = 4096
SOCKET_BYTES = 1024 * 1024

log = get_logger(__name__)


class ProcessLaunch:
    """Starts engines of one model; `argv` makes the command line, without `--fd N`, from a folder."""

    def __init__(self, model: str, argv: Callable[[str], Sequence[str]]) -> None:
        self._model = model
        self._argv = argv

    async def __call__(self, folder: str, on_event: Callable[[Event], None]) -> EngineLink:
        """Raises OSError when no process can be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        try:
            with theirs:
                process = _spawn([*self._argv(folder), "--fd", str(theirs.fileno())], theirs.fileno())
        except BaseException:
            ours.close()
            raise
        try:
            link = _EngineProcess(self._model, process, on_event)
        except RuntimeError as error:
            # No thread is to be had: without one nobody would bury it.
            ours.close()
            process.kill()
            process.communicate()
            raise OSError(f"cannot watch it: {error}") from error
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        except BaseException:
            link.kill()
            raise
        return link


def _spawn(argv: Sequence[str], fd: int) -> subprocess.Popen[bytes]:
    """A few milliseconds on the event loop: an await here could leave a process without an owner."""
    return subprocess.Popen(
        [sys.executable, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(fd,),
        # Its own group: Ctrl-C in a terminal must not kill engines that are to drain.
        process_group=0,
    )


class _EngineProcess(asyncio.Protocol):
    """The `EngineLink` of one process."""

    def __init__(
        self, model: str, process: subprocess.Popen[bytes], on_event: Callable[[Event], None]
    ) -> None:
        self._model = model
        self._process = process
        self._on_event = on_event
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._cause = ""
        self._how = ""
        self._lost = False
        """Whether everything that it sent was read."""
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        assert process.stdout is not None
        self._last_line = ""
        self._pumping = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
        self._pumping.start()
        threading.Thread(target=self._wait, name=f"wait {model}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, command: Command) -> bool:
        """Hand a command over at once. False when the engine no longer takes any."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if isinstance(command, Submit) and transport.get_write_buffer_size() > OUTBOX_BYTES_MAX:
            return False
        transport.write(encode(command))
        return True

    def kill(self) -> None:
        """End the process now. Harmless when it is gone."""
        if self._transport is not None:
            self._transport.abort()
        if self._process.returncode is None:
            self._process.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._on_event(decode_event(body))
        except (ValueError, msgspec.MsgspecError) as error:
            self._cause = f"it spoke another protocol: {error}"
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._how:
            self._end()
        elif not self.ended.done():
            self._loop.call_later(LINGER_S, self.kill)

    def _wait(self) -> None:
        status = self._process.wait()
        # What it said last often says why it ended; a child of its own may hold the pipe for ever.
        self._pumping.join(LAST_WORDS_S)
        self._from_thread(lambda: self._gone(status))

    def _gone(self, status: int) -> None:
        """Why it ended may be in what it sent last, and a busy loop has not read that yet."""
        self._how = self._cause or _how(status, self._last_line)
        if self._lost:
            self._end()
        else:
            self._loop.call_later(LAST_WORDS_S, self._end)

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.ended.done():
            self.ended.set_result(self._how)

    def _pump(self, lines: IO[bytes]) -> None:
        with lines:
            while line := lines.readline(LINE_CHARS_MAX):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._last_line = text
                    log.info("engine says", model=self._model, pid=self._process.pid, line=text)

    def _from_thread(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop is closed: this worker is going away, and nobody waits for the engine any more.
            return


def _how(status: int, last_line: str) -> str:
    if status >= 0:
        return (
            f"exit status {status}: {last_line[-200:]}" if status and last_line else f"exit status {status}"
        )
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
