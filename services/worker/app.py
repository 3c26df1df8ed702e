"""Builds a worker front from its settings: the only place where real things are made and joined."""

from __future__ import annotations

import asyncio
import uuid

from loom.worker.v1 import worker_pb2
from prometheus_client import REGISTRY, CollectorRegistry

from services.worker.adapters import memory, orca, spans
from services.worker.adapters.engines import SimEngines, TorchEngines
from services.worker.adapters.store import GrpcModelStore
from services.worker.adapters.weights import NoWeights, weight_cache
from services.worker.front.admission import Admission
from services.worker.front.engine import Engine, EngineBounds
from services.worker.front.models import ModelBounds, Models
from services.worker.front.ports import Engines, Launch, ModelStore, ModelVersion, Weights
from services.worker.front.publisher import Publisher
from services.worker.front.report import ReportBuilder
from services.worker.front.reservation import in_words
from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from services.worker.front.worker import Worker
from services.worker.metrics import StateCollector, WorkerMetrics
from services.worker.servicer import WorkerServicer
from services.worker.settings import WorkerSettings, split_models
from tokenloom.kit.channels import open_channel
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.logs import get_logger
from tokenloom.kit.server import Call, GrpcServer

WORKER_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
STOP_GRACE_S = 1.0
"""For streams that are still open when everything else has ended."""

Ports = tuple[ModelStore, Weights, Engines]

log = get_logger(__name__)


class WorkerApp:
    """One worker process, as `tokenloom.kit.service.run` starts and stops it."""

    def __init__(self, settings: WorkerSettings, registry: CollectorRegistry = REGISTRY) -> None:
        self._settings = settings
        self._registry = registry
        self._clock = SystemClock()
        self._tasks: list[asyncio.Task[None]] = []
        self._serving: bool | None = None
        self._state_changed = asyncio.Event()
        self._started = False
        self.port = 0
        """The bound gRPC port, once started."""

    async def start(self) -> None:
        """Bind the port and begin to make models resident. Raises OSError when the port is taken."""
        settings = self._settings
        self._server = GrpcServer(settings.host, settings.port)
        self._channel = open_channel(settings.modelstore_target)
        self._publisher = Publisher(
            lambda: self._worker.report(),
            self._clock,
            report_interval_s=settings.report_interval_ms / 1000,
            heartbeat_s=settings.heartbeat_ms / 1000,
        )
        self._metrics = WorkerMetrics(self._registry)
        device = await asyncio.to_thread(memory.look, settings)
        models = self._make_models(device)
        reports = ReportBuilder(
            uuid.uuid4().hex,
            lambda: models.free_bytes,
            memory_budget_bytes=device.budget_bytes,
            loads_on_demand=settings.loads_on_demand,
        )
        self._worker = Worker(
            endpoint=settings.advertise or f"{settings.host}:{settings.port}",
            models=models,
            reports=reports,
            clock=self._clock,
            changed=self._changed,
        )
        self._metrics.watch(
            StateCollector(models.all, lambda: self._publisher.listeners, lambda: self._worker.draining)
        )
        servicer = WorkerServicer(
            self._worker,
            self._publisher,
            self._clock,
            self._ended,
            self._metrics.refused,
            default_timeout_s=settings.default_timeout_s,
            drain_grace_s=settings.drain_grace_s,
        )
        self._started = True
        self._server.add(WORKER_SERVICE, servicer, quiet={"WatchLoad", "ListModels"})
        self._server.add(orca.SERVICE, orca.OrcaServicer(models.all), quiet={"StreamCoreMetrics"})
        self.port = await self._server.start()
        if not settings.advertise:
            self._worker.endpoint = f"{settings.host}:{self.port}"
        models.start(split_models(settings.models))
        self._tasks = [asyncio.create_task(self._tell_health(), name="health")]
        budget = in_words(device.budget_bytes) if device.budget_bytes else "not bounded"
        log.info("worker listens", endpoint=self._worker.endpoint, engine=settings.engine, memory=budget)
        if not device.budget_bytes:
            log.warning("nobody says how much memory the engines may have: set memory_bytes", on=device.kind)

    def readiness(self) -> str:
        """Empty when every configured model can serve, else one line why not."""
        if not self._started:
            return "starting"
        return "draining" if self._worker.draining else self._worker.models.missing()

    async def drain(self, grace_s: float) -> None:
        """Refuse new sequences; return when the present ones ended or were handed back."""
        handed_back = await self._worker.drain(grace_s)
        log.info("drained", handed_back=handed_back)

    async def close(self) -> None:
        """End the streams, the engines and the port."""
        if not self._started:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._publisher.close()
        await self._server.stop(STOP_GRACE_S)
        await self._worker.models.close()
        await self._channel.close(None)
        self._metrics.close()

    def _ports(self, device: memory.Device) -> Ports:
        """Where versions, weights and engines come from."""
        settings = self._settings
        store = GrpcModelStore(self._channel, settings.modelstore_target)
        if settings.engine == "sim":
            return store, NoWeights(), SimEngines(settings)
        return store, weight_cache(settings, store), TorchEngines(settings, device)

    def _make_models(self, device: memory.Device) -> Models:
        settings = self._settings
        store, weights, engines = self._ports(device)
        return Models(
            store=store,
            weights=weights,
            engines=engines,
            make_engine=self._make_engine,
            budget_bytes=device.budget_bytes,
            bounds=ModelBounds(
                models_max=settings.models_max,
                resolve_backoff_max_s=settings.resolve_backoff_max_s,
                min_dwell_s=settings.min_dwell_s,
                evict_grace_s=settings.evict_grace_s,
                failed_keep_s=settings.failed_keep_s,
                loads_on_demand=settings.loads_on_demand,
            ),
            clock=self._clock,
            changed=self._changed,
        )

    def _make_engine(self, version: ModelVersion, launch: Launch) -> Engine:
        settings = self._settings
        return Engine(
            model=version.name,
            worker=self._worker.endpoint,
            launch=launch,
            admission=Admission(settings.unleased_queue_max),
            clock=self._clock,
            bounds=EngineBounds(
                restart_backoff_max_s=settings.restart_backoff_max_s,
                load_attempts_max=settings.load_attempts_max,
                load_timeout_s=settings.load_timeout_s,
                silence_max_s=settings.silence_max_s,
            ),
            changed=self._changed,
        )

    def _changed(self) -> None:
        self._publisher.changed()
        self._state_changed.set()

    def _ended(self, sequence: Sequence, resident: Resident, outcome: str, call: Call) -> None:
        self._metrics.ended(sequence, resident.version.name, outcome)
        spans.record_sequence(sequence, resident, outcome, call)

    async def _tell_health(self) -> None:
        """Health checks say SERVING exactly while the worker is ready."""
        while True:
            serving = not self.readiness()
            if serving is not self._serving:
                self._serving = serving
                await self._server.set_serving(serving)
            self._state_changed.clear()
            await self._state_changed.wait()


def build(settings: WorkerSettings) -> WorkerApp:
    """The worker of these settings, not started yet."""
    return WorkerApp(settings)
