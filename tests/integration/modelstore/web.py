"""A server of files as a test wants it: slow, forgetful, breaking off, redirecting."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate

from aiohttp import web

PIECE_BYTES = 4096


@dataclass
class FileServer:
    """Serves `files` by path, with ETags and ranges."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Answers to give first, one after the other."""
    headers: dict[str, str] = field(default_factory=dict)
    etags: bool = True
    ranges: bool = True
    lengths: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes after which a body breaks off, for one body after the other."""
    pause_s: float = 0.0
    """Between two pieces."""
    hold_at_bytes: int | None = None
    """How many bytes are sent in all before no more come."""
    hang: bool = False
    modified: dict[str, int] = field(default_factory=dict)
    """Unix seconds to date files with; who asks for newer ones gets no older ones either."""
    changes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files that others become when one is asked for."""
    conditions: bool = True
    """Whether If-None-Match is heeded."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(path, Range) of every request."""
    sent_bytes: int = 0
    url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        self.asked.append((path, request.headers.get("Range", "")))
        self.files |= self.changes.pop(path, {})
        if self.statuses.get(path):
            return web.Response(status=self.statuses[path].pop(0))
        if path in self.redirects:
            return web.Response(status=302, headers={"Location": self.redirects[path]})
        if path not in self.files:
            return web.Response(status=404)
        data = self.files[path]
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = ({"ETag": tag} if self.etags else {}) | self.headers
        if self.etags and self.conditions and request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        if path in self.modified:
            headers["Last-Modified"] = formatdate(self.modified[path], usegmt=True)
            since = request.if_modified_since
            if since is not None and self.modified[path] <= since.timestamp():
                return web.Response(status=304, headers=headers)
        start = self._start(request, tag)
        if start is None:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        if self.lengths:
            response.content_length = len(data) - start
        await response.prepare(request)
        await self._send(request, response, data[start:])
        return response

    def _start(self, request: web.Request, tag: str) -> int | None:
        found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not found or not self.ranges or request.headers.get("If-Range", tag) != tag:
            return 0
        start = int(found[1])
        return start if start < len(self.files[request.rel_url.raw_path]) else None

    async def _send(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        if self.hang:
            await asyncio.Event().wait()
        limit = self.break_after.pop(0) if self.break_after else None
        for at in range(0, len(data), PIECE_BYTES):
            if limit is not None and at + PIECE_BYTES > limit:
                await response.write(data[at:limit])
                self.sent_bytes += limit - at
                assert request.transport is not None
                request.transport.close()
                return
            if self.hold_at_bytes is not None and self.sent_bytes >= self.hold_at_bytes:
                await asyncio.Event().wait()
            piece = data[at : at + PIECE_BYTES]
            await response.write(piece)
            self.sent_bytes += len(piece)
            if self.pause_s:
                await asyncio.sleep(self.pause_s)


@asynccontextmanager
async def serving(server: FileServer) -> AsyncIterator[FileServer]:
    """Run it on a free port; `url` is its root."""
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
