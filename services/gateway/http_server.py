"""uvicorn inside a process that has its own signal handling and event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 4096
KEEP_ALIVE_S = 4000
"""Longer than proxies keep idle connections (an hour, as a rule): whoever closes first must not be us,
or a request sent at that moment is lost."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the service's own life cycle."""
        yield


class HttpServer:
    """Serves one ASGI application on one port."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self._address = (host, port)
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and serve; the bound port. Raises OSError when the port is taken."""
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server(self._address, family=family, backlog=BACKLOG)
        except OSError as error:
            raise OSError(f"cannot bind {host}:{port}: is the port in use? ({error.strerror})") from error
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Take no new connections; cut those still open after `grace_s`."""
        if self._task is None:
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=grace_s)
        if not done:
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=1.0)
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
