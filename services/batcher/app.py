"""Builds a batcher from its settings: the only place where real things are made and joined."""

from __future__ import annotations

import asyncio
import uuid

from envoy.service.ext_proc.v3 import external_processor_pb2
from loom.batcher.v1 import batcher_pb2
from prometheus_client import REGISTRY, CollectorRegistry

from services.batcher.adapters.discovery import parse_workers
from services.batcher.adapters.health import HealthPort
from services.batcher.adapters.loader import GrpcLoader
from services.batcher.adapters.watch import GrpcFleetWatch
from services.batcher.core.scheduler import Scheduler
from services.batcher.driver import Driver
from services.batcher.metrics import BatcherMetrics
from services.batcher.servicer import BatcherServicer, ExternalProcessor
from services.batcher.settings import BatcherSettings
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.logs import get_logger
from tokenloom.kit.server import GrpcServer

EXT_PROC_SERVICE = external_processor_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"]
BATCHER_SERVICE = batcher_pb2.DESCRIPTOR.services_by_name["BatcherService"]
STOP_GRACE_S = 0.5
"""For refusals that are on their way when everything else has ended."""

log = get_logger(__name__)


class BatcherApp:
    """One batcher process, as `tokenloom.kit.service.run` starts and stops it."""

    def __init__(self, settings: BatcherSettings, registry: CollectorRegistry = REGISTRY) -> None:
        self._settings = settings
        self._registry = registry
        self._started = False
        self.port = 0
        """The bound port of ext_proc and BatcherService, once started."""
        self.health_port = 0

    async def start(self) -> None:
        """Bind the ports and look for workers. Raises OSError when a port is taken."""
        settings, clock = self._settings, SystemClock()
        scheduler = Scheduler(settings.limits(), f"{settings.name}-{uuid.uuid4().hex[:8]}")
        self._metrics = BatcherMetrics(self._registry, settings.tenant_weights)
        self._metrics.watch(scheduler, clock)
        self._loader = GrpcLoader(settings.load_timeout_s)
        self._driver = Driver(
            scheduler, clock, self._metrics, self._loader, watchers_max=settings.watchers_max
        )
        self._fleet = GrpcFleetWatch(
            parse_workers(settings.workers), settings.name, settings.discovery_interval_s
        )
        self._server = GrpcServer(settings.host, settings.port)
        self._server.add(
            EXT_PROC_SERVICE, ExternalProcessor(self._driver, clock, self._metrics), quiet={"Process"}
        )
        self._server.add(
            BATCHER_SERVICE,
            BatcherServicer(self._driver, clock),
            quiet={"GetState", "WatchState", "WatchRequest"},
        )
        self._health = HealthPort(settings.host, settings.health_port)
        self._started = True
        self.port = await self._server.start()
        self.health_port = await self._health.start()
        self._fleet.start(self._driver)
        await self._server.set_serving(True)
        await self._health.set_ready(True)
        log.info("batcher listens", port=self.port, health_port=self.health_port, workers=settings.workers)

    def readiness(self) -> str:
        """Empty when new requests are taken and the workers were looked for once."""
        if not self._started or not self._fleet.discovered:
            return "starting"
        return "draining" if self._driver.draining else ""

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests; return when nobody waits, or after `grace_s`."""
        remaining = self._driver.drain()
        await self._health.set_ready(False)
        await self._server.set_serving(False)
        log.info("draining", waiting=remaining)
        try:
            async with asyncio.timeout(grace_s):
                await self._driver.drained()
        except TimeoutError:
            log.warning("requests still wait at the end of the drain; they are refused")

    async def close(self) -> None:
        """Refuse what still waits, and free everything."""
        if not self._started:
            return
        await self._fleet.close()
        # Before the loader: its timer asks for loads.
        self._driver.close()
        await self._loader.close()
        await self._server.stop(STOP_GRACE_S)
        await self._health.close()
        self._metrics.close()


def build(settings: BatcherSettings) -> BatcherApp:
    """The batcher of these settings, not started yet."""
    return BatcherApp(settings)
