"""One HTTP/1.1 connection of the load client: a request out, an answer's body in, piece by piece.

The client shares the machine with what it measures. So a piece is taken where it arrives, in the loop's
callback, with one look at the clock for all that came at once; no task wakes up before the answer's end.
Knows no JSON and no events. Bounds: one request at a time, BODY_BYTES_MAX of an answer that is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools

BODY_BYTES_MAX = 4 << 20
"""A longer answer that is no stream is not what was asked for."""

Take = Callable[[bytes, float], None]
"""Is given a piece of a body and when it came. What it raises ends the answer."""


class Disconnected(Exception):
    """The other side went away before its answer ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came; `body` is empty where the pieces were taken."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """To one server. Not before `connection_made`, and never again after `usable` became False."""

    def __init__(self) -> None:
        self._transport: Any = None
        """uvloop's transports do not derive from asyncio's."""
        self._parser: Any = None
        self._waiter: asyncio.Future[int] | None = None
        self._wanted: Take | None = None
        self._take: Take = self._keep
        self._kept = bytearray()
        self._now_s = 0.0
        self._framed = False

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and self._waiter is None and not self._transport.is_closing()

    async def ask(self, request: bytes, take: Take | None = None) -> Answer:
        """Sends a request and waits for its answer's end. `take` is given the body if the status is 200.

        Raises Disconnected, ValueError for what is no HTTP, and what `take` raises. When it is cancelled
        the connection is closed.
        """
        if not self.usable:
            raise Disconnected
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._parser, self._wanted, self._framed = httptools.HttpResponseParser(self), take, False
        self._kept.clear()
        try:
            self._transport.write(request)
            status = await waiter
        except BaseException:
            self._transport.abort()
            raise
        finally:
            self._waiter = None
        return Answer(status, bytes(self._kept))

    def close(self) -> None:
        """At once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            # Nobody asked for it.
            self._transport.abort()
            return
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ValueError(f"no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._framed and exc is None and self._parser.get_status_code():
            self._end()
        else:
            self._fail(Disconnected())

    def on_header(self, name: bytes, _: bytes) -> None:
        """Of the parser. Without one of these the end of the connection is that of the body."""
        self._framed = self._framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Of the parser."""
        good = self._parser.get_status_code() == 200
        self._take = self._wanted if good and self._wanted is not None else self._keep

    def on_body(self, body: bytes) -> None:
        """Of the parser."""
        if self._waiter is None or self._waiter.done():
            return
        try:
            self._take(body, self._now_s)
        except Exception as error:
            self._fail(error)

    def on_message_complete(self) -> None:
        """Of the parser. Before the final answer there may be others, of status 1xx."""
        if self._parser.get_status_code() < 200:
            return
        self._end()
        if not self._parser.should_keep_alive():
            self._transport.close()

    def _keep(self, data: bytes, _: float) -> None:
        if len(self._kept) + len(data) > BODY_BYTES_MAX:
            raise ValueError(f"an answer of more than {BODY_BYTES_MAX:,} bytes")
        self._kept += data

    def _end(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(self._parser.get_status_code())

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
