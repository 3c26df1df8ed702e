"""gRPC health on a port of its own, under the names that endpoint pickers are asked by.

`liveness` serves as long as the process runs; the others only while new requests are taken.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
READY_NAMES = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
STREAMS_MAX = 1_000

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthPort:
    """The port. `NOT_SERVING` until told otherwise."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"{host}:{port}"
        self._server: Any = grpc.aio.server(
            maximum_concurrent_rpcs=STREAMS_MAX, options=[("grpc.so_reuseport", 0)]
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]

    async def start(self) -> int:
        """Bind and serve; the bound port. Raises OSError when the port is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._health.set(LIVENESS, _SERVING)
        await self.set_ready(False)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(f"cannot bind {self._address}: is the port in use?") from error
        await self._server.start()
        return int(port)

    async def set_ready(self, ready: bool) -> None:
        """Whether new requests are taken."""
        for name in READY_NAMES:
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    async def close(self) -> None:
        """Stop at once."""
        await self._server.stop(None)
