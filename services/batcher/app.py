"""Builds a batcher from its settings: the only place where real things are made and joined."""

from __future__ import annotations

import uuid

from envoy.service.ext_proc.v3 import external_processor_pb2
from loom.batcher.v1 import batcher_pb2
from prometheus_client import REGISTRY, CollectorRegistry

from services.batcher.adapters.discovery import parse_workers
from services.batcher.adapters.watch import GrpcFleetWatch
from services.batcher.core.scheduler import Scheduler
from services.batcher.driver import Driver
from services.batcher.metrics import BatcherMetrics, StateCollector
from services.batcher.servicer import BatcherServicer, ExternalProcessorServicer
from services.batcher.settings import BatcherSettings
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.server import GrpcServer

EXT_PROC = external_processor_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"]
BATCHER = batcher_pb2.DESCRIPTOR.services_by_name["BatcherService"]
HEALTH_NAMES = ("liveness", "readiness", EXT_PROC.full_name)
"""What endpoint pickers are asked for."""
STOP_GRACE_S = 0.5


class BatcherApp:
    """One batcher process, as `tokenloom.kit.service.run` starts and stops it."""

    def __init__(self, settings: BatcherSettings, registry: CollectorRegistry = REGISTRY) -> None:
        clock = SystemClock()
        scheduler = Scheduler(settings.limits(), lease_prefix=uuid.uuid4().hex[:8])
        self.driver = Driver(scheduler, clock, BatcherMetrics(registry))
        registry.register(StateCollector(scheduler))
        self._watch = GrpcFleetWatch(
            parse_workers(settings.workers), f"batcher {settings.name}", settings.discovery_interval_s
        )
        self._server = GrpcServer(settings.host, settings.port)
        self._server.add(EXT_PROC, ExternalProcessorServicer(self.driver, clock), quiet={"Process"})
        quiet = {"WatchState", "WatchRequest"}
        self._server.add(BATCHER, BatcherServicer(self.driver, clock), quiet=quiet)
        self._health = GrpcServer(settings.host, settings.health_port)
        self._health.answer_health_for(*HEALTH_NAMES)
        self.port = 0
        self.health_port = 0

    async def start(self) -> None:
        """Bind, serve, and look for workers. Raises OSError when a port is taken."""
        self.port = await self._server.start()
        self.health_port = await self._health.start()
        self._watch.start(self.driver)
        for server in (self._server, self._health):
            await server.set_serving(True)

    def readiness(self) -> str:
        """Ready once discovery answered: requests for workers that come later are held."""
        return "" if self._watch.discovered else "workers were not discovered yet"

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, place those that wait, and let leases end."""
        await self._health.set_serving(False)
        self.driver.drain()
        await self.driver.drained(grace_s)

    async def close(self) -> None:
        """Refuse what still waits and free everything."""
        self.driver.close()
        await self._watch.close()
        await self._server.stop(STOP_GRACE_S)
        await self._health.stop(0)


def build(settings: BatcherSettings) -> BatcherApp:
    """For `run`."""
    return BatcherApp(settings)
