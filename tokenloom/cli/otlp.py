"""The launcher's own OTLP/gRPC receiver: services and Envoy export to it, it writes a file.

Bounds: a message is at most `EXPORT_BYTES_MAX`, at most `EXPORTS_MAX` are handled at once; what does
not fit is refused, and the exporters drop it. Nothing waits for a trace.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

from tokenloom.cli.spans import Span, SpanFile, from_otlp

EXPORT_BYTES_MAX = 16 * 1024 * 1024
EXPORTS_MAX = 64


class Receiver(rpc.TraceServiceServicer):
    """`opentelemetry.proto.collector.trace.v1.TraceService`, into a SpanFile."""

    def __init__(self, path: Path) -> None:
        self._file = SpanFile(path)
        # One thread: appends never overlap, and the disk never stops the event loop.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spans")
        self._server: Any = None

    async def start(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve; the bound port. Raises RuntimeError when the port is taken."""
        options = [("grpc.max_receive_message_length", EXPORT_BYTES_MAX), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=EXPORTS_MAX)
        rpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        bound = self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()
        return int(bound)

    async def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        await asyncio.get_running_loop().run_in_executor(self._disk, self._write, request)
        return pb.ExportTraceServiceResponse()

    def _write(self, request: pb.ExportTraceServiceRequest) -> None:
        spans: list[Span] = list(from_otlp(request))
        if spans:
            self._file.append(spans)

    async def close(self) -> None:
        """Take what is on its way for a moment, then stop."""
        if self._server is not None:
            await self._server.stop(1.0)
        self._disk.shutdown()
