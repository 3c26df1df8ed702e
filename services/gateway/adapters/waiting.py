"""`WatchRequest` for callers: what becomes of a request while it waits, asked of every batcher replica.

Only the replica that holds the request knows it, and nobody knows which that is: all are asked, and the
first that knows it is listened to. Bounds: `REPLICAS_MAX` replicas, `WATCHES_MAX` watches at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import grpc
from loom.batcher.v1 import batcher_pb2 as pb

from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, field_invalid, from_rpc_error
from tokenloom.kit.server import Call

DNS_SCHEME = "dns:///"
METHOD = "/loom.batcher.v1.BatcherService/WatchRequest"
REPLICAS_MAX = 16
WATCHES_MAX = 10_000
REQUEST_ID_CHARS_MAX = 128
RETRY_S = 1.0
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class RequestWatch:
    """The one method of `loom.batcher.v1.BatcherService` that callers of the mesh may use."""

    def __init__(self, target: str) -> None:
        """`target`: `host:port` or `dns:///host:port` of the batchers."""
        host, _, port = target.removeprefix(DNS_SCHEME).rpartition(":")
        self._host, self._port = host, int(port)
        self._watches = 0

    async def WatchRequest(
        self, request: pb.WatchRequestRequest, call: Call
    ) -> AsyncGenerator[pb.WatchRequestResponse, None]:
        """Places while it waits, its model's load, then how that ended. Raises CallError."""
        if not 1 <= len(request.request_id) <= REQUEST_ID_CHARS_MAX:
            raise field_invalid(("request_id", f"must have 1 to {REQUEST_ID_CHARS_MAX} characters"))
        if self._watches >= WATCHES_MAX:
            message = f"{WATCHES_MAX:,} requests are watched already; try again in {RETRY_S:.0f} s"
            raise CallError("QUEUE_FULL", message, metadata={"queue": "watches"}, retry_after_s=RETRY_S)
        self._watches += 1
        try:
            async with AsyncExitStack() as stack:
                stream, first = await self._who_knows(request.SerializeToString(), stack)
                data = first
                while data is not _EOF:
                    yield pb.WatchRequestResponse.FromString(data)
                    data = await _read(stream)
        finally:
            self._watches -= 1

    async def _who_knows(self, request: bytes, stack: AsyncExitStack) -> tuple[Any, Any]:
        """The stream of the first replica that answers, and its first message."""
        streams = []
        for address in await self._replicas():
            channel = open_channel(address)
            stack.push_async_callback(channel.close, None)
            stream: Any = channel.unary_stream(METHOD, None, None)(request)
            stack.callback(stream.cancel)
            streams.append(stream)
        asking = {asyncio.create_task(_read(stream)): stream for stream in streams}
        stack.callback(lambda: [task.cancel() for task in asking])
        refusal = CallError("SERVICE_UNAVAILABLE", "no batcher answers", metadata={"service": "batcher"})
        waiting = set(asking)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    return asking[task], task.result()
                if not isinstance(error, CallError):
                    raise error
                # That a replica does not know it says more than that another one is away.
                refusal = refusal if refusal.reason == "REQUEST_NOT_FOUND" else error
        raise refusal

    async def _replicas(self) -> list[str]:
        """`ip:port` of each. Raises CallError while the name cannot be looked up."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            message = f"no batcher is found at {self._host}: {error.strerror or error}"
            raise CallError("SERVICE_UNAVAILABLE", message, metadata={"service": "batcher"}) from None
        hosts = sorted({str(address[0]) for *_, address in found})[:REPLICAS_MAX]
        return [f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}" for host in hosts]


async def _read(stream: Any) -> Any:
    try:
        return await stream.read()
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
