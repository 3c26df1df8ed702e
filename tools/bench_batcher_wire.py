"""gRPC calls over HTTP/2 for the load of `tools.bench_batcher`, for a tenth of what grpc.aio takes.

The load shares two cores with what it measures. So headers go out as literals, one answer's messages are
handed over as they come, and the connection's windows are opened once. What it must not be is a client for
anything else: no TLS, no cancelling, request bodies of at most one frame. Names of errors come from
the trailers; `hpack` decodes them, once for each different block.

Bounds: STREAMS_MAX calls of a connection at once, or as many as the server allows; the others wait in order.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple, cast

import hpack

Headers = Iterable[tuple[str, str | bytes]]
OnMessage = Callable[[bytes], None]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES_MAX = 16_384
"""RFC 9113, section 6.5.2: what a peer that said nothing takes."""
WINDOW_BYTES = 65_535
WINDOW_BYTES_MAX = (1 << 31) - 1
STREAMS_MAX = 1_000
MESSAGE_BYTES_MAX = 1 << 20
BLOCKS_MAX = 256
"""Different trailers that are remembered."""

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
"""Frame types, RFC 9113, section 6."""
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 3, 4
"""Settings, section 6.5.2."""
REFUSED_STREAM = 7
"""Section 7: the server has not looked at it."""


class WireError(Exception):
    """The peer, or the connection, did what this client does not put up with."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame, RFC 9113, section 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: Headers) -> bytes:
    """Literal fields that no table remembers, RFC 7541, section 6.2.2; bytes in base64, as gRPC."""
    parts: list[bytes] = []
    for name, value in headers:
        raw = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        parts += (b"\x00", _string(name.encode()), _string(raw))
    return b"".join(parts)


def _string(raw: bytes) -> bytes:
    """Plain octets after their length, a number with a prefix of 7 bits (sections 5.1 and 5.2)."""
    rest = len(raw) - 127
    if rest < 0:
        return bytes((len(raw),)) + raw
    length = bytearray((127,))
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    length.append(rest)
    return bytes(length) + raw


@lru_cache(BLOCKS_MAX)
def read_block(block: bytes) -> dict[str, str]:
    """The fields of a block whose peer was told to keep no table."""
    return {str(name): str(value) for name, value in hpack.Decoder().decode(block)}


class Call:
    """One call. `ended` has its last header block's fields, or the error of the connection."""

    __slots__ = ("_buffer", "_on_message", "ended")

    def __init__(self, on_message: OnMessage) -> None:
        self._on_message = on_message
        self._buffer = b""
        self.ended: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    def take(self, data: bytes) -> None:
        """Bytes of the answer: messages behind a flag and a length of four bytes each."""
        data = self._buffer + data if self._buffer else data
        at = 0
        while len(data) - at >= 5:
            if data[at]:
                raise WireError("a compressed message was not asked for")
            length = int.from_bytes(data[at + 1 : at + 5])
            if length > MESSAGE_BYTES_MAX:
                raise WireError(f"a message of {length} bytes is above the bound of {MESSAGE_BYTES_MAX}")
            if len(data) - at - 5 < length:
                break
            self._on_message(data[at + 5 : at + 5 + length])
            at += 5 + length
        self._buffer = data[at:]

    def end(self, fields: dict[str, str]) -> None:
        """Its stream is over."""
        if not self.ended.done():
            self.ended.set_result(fields)

    def fail(self, error: WireError) -> None:
        """Its connection is."""
        if not self.ended.done():
            self.ended.set_exception(error)


class _Asked(NamedTuple):
    """A call, and what is sent for it."""

    block: bytes
    body: bytes
    call: Call


class Connection(asyncio.Protocol):
    """One connection to a server that speaks HTTP/2 from the first byte."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._calls: dict[int, _Asked] = {}
        self._waiting: deque[_Asked] = deque()
        self._next_stream = 1
        self._window = WINDOW_BYTES
        self._streams_max = STREAMS_MAX
        self._buffer = b""

    def start(self, block: bytes, message: bytes, on_message: OnMessage) -> Call:
        """Begin a call with one message as soon as the server lets it. Raises WireError for a long one."""
        body = b"\0" + struct.pack(">I", len(message)) + message
        if max(len(body), len(block)) > FRAME_BYTES_MAX:
            raise WireError(f"headers and message may have {FRAME_BYTES_MAX} bytes each")
        asked = _Asked(block, body, Call(on_message))
        self._waiting.append(asked)
        self._begin()
        return asked.call

    def close(self) -> None:
        """Calls that are under way fail."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says once how much may come: nobody here reads too slowly to be told."""
        self._transport = cast(asyncio.WriteTransport, transport)
        settings = ((HEADER_TABLE_SIZE, 0), (INITIAL_WINDOW_SIZE, WINDOW_BYTES_MAX))
        more = struct.pack(">I", WINDOW_BYTES_MAX - WINDOW_BYTES)
        hello = frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *each) for each in settings))
        self._write(PREFACE + hello + frame(WINDOW_UPDATE, 0, 0, more))

    def data_received(self, data: bytes) -> None:
        """Whole frames are handled, a piece of one is kept."""
        data = self._buffer + data if self._buffer else data
        at, size = 0, len(data)
        try:
            while size - at >= 9:
                end = at + 9 + int.from_bytes(data[at : at + 3])
                if end > size:
                    break
                stream = int.from_bytes(data[at + 5 : at + 9]) & WINDOW_BYTES_MAX
                self._take(data[at + 3], data[at + 4], stream, data[at + 9 : end])
                at = end
        except WireError as error:
            self._fail(error)
            self.close()
            return
        self._buffer = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for what cannot come."""
        self._transport = None
        self._fail(WireError(f"the connection was lost: {exc or 'closed'}"))

    # Frames

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            if flags & PADDED:
                raise WireError("padding is not expected")
            asked = self._calls.get(stream)
            if asked is not None:
                asked.call.take(payload)
                if flags & END_STREAM:
                    self._ended(stream, {})
        elif kind == HEADERS:
            if not flags & END_HEADERS or flags & PADDED:
                raise WireError("a header block must be one frame without padding")
            if flags & END_STREAM:
                self._ended(stream, read_block(payload))
        elif kind == RST_STREAM:
            self._reset(stream, int.from_bytes(payload))
        elif kind == SETTINGS and not flags & ACK:
            self._agree(payload)
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            raise WireError("the server ends the connection")
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload)
            self._begin()

    def _agree(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == MAX_CONCURRENT_STREAMS:
                self._streams_max = min(value, STREAMS_MAX)
            elif name == INITIAL_WINDOW_SIZE and value < FRAME_BYTES_MAX + 5:
                raise WireError(f"a stream's window of {value} bytes holds no message")
        self._write(frame(SETTINGS, ACK, 0))
        self._begin()

    def _ended(self, stream: int, fields: dict[str, str]) -> None:
        asked = self._calls.pop(stream, None)
        if asked is not None:
            asked.call.end(fields)
            self._begin()

    def _reset(self, stream: int, code: int) -> None:
        if code == REFUSED_STREAM and (asked := self._calls.pop(stream, None)) is not None:
            # Nothing of it was looked at: the server still counts a stream that has ended here.
            self._waiting.appendleft(asked)
            self._begin()
            return
        self._ended(stream, {"grpc-status": "13", "grpc-message": f"RST_STREAM with code {code}"})

    def _begin(self) -> None:
        """Those who wait, as far as the server's bounds go."""
        while self._waiting and len(self._calls) < self._streams_max:
            asked = self._waiting[0]
            if self._transport is None or len(asked.body) > self._window:
                return
            self._waiting.popleft()
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            self._window -= len(asked.body)
            self._calls[stream] = asked
            headers = frame(HEADERS, END_HEADERS, stream, asked.block)
            self._write(headers + frame(DATA, END_STREAM, stream, asked.body))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _fail(self, error: WireError) -> None:
        failed = [*self._calls.values(), *self._waiting]
        self._calls.clear()
        self._waiting.clear()
        for asked in failed:
            asked.call.fail(error)


async def connect(target: str) -> Connection:
    """To `host:port`. Raises OSError."""
    host, _, port = target.rpartition(":")
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, host, int(port))
    return connection
