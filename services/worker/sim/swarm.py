"""`python -m services.worker.sim.swarm`: many sim workers in one process, each on a port of its own.

Every worker is the whole front of `services.worker.app`: gRPC port, admission, load reports, metrics.
Only the engine process is replaced, by `inline.py`, and the modelstore, by one version that is always
there. So a machine with two cores can hold the hundred workers that a batcher is to be tried with.

Settings are those of a worker, `TOKENLOOM_WORKER_<NAME>`, with `SWARM_PORTS` and `SWARM_VERSION` beside
them; they are the same for all workers. Bounds: `PORTS_MAX` workers.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry
from pydantic import Field, field_validator

from services.worker.adapters.engines import SimEngines
from services.worker.adapters.memory import Device
from services.worker.adapters.weights import NoWeights
from services.worker.app import Ports, WorkerApp
from services.worker.front.ports import ModelVersion
from services.worker.settings import WorkerSettings
from services.worker.sim.inline import InlineEngines
from tokenloom.kit.errors import CallError
from tokenloom.kit.service import run

PORTS_MAX = 1_000


class SwarmSettings(WorkerSettings):
    """Settings of all workers of one swarm."""

    swarm_ports: str = Field(min_length=1)
    """Comma-separated gRPC ports, one for each worker."""
    swarm_version: str = Field(pattern=r"sha256:[0-9a-f]{64}")
    """The digest that every name in `models` stands for."""

    @field_validator("swarm_ports")
    @classmethod
    def _ports_are_ports(cls, value: str) -> str:
        ports = split_ports(value)
        if len(set(ports)) != len(ports) or len(ports) > PORTS_MAX:
            raise ValueError(f"must list at most {PORTS_MAX} different ports")
        return value


def split_ports(value: str) -> list[int]:
    """Raises ValueError for what is no port."""
    ports = [int(part) for part in value.split(",")]
    if not all(0 < port < 65_536 for port in ports):
        raise ValueError("must list numbers from 1 to 65535")
    return ports


class OneVersion:
    """A `ModelStore` in which every name is the same version, without files."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    async def resolve(self, model: str) -> ModelVersion:
        """The version, under this name."""
        return ModelVersion(self._digest, model, context_length=0, vocab_size=0)

    async def get_version(self, digest: str) -> ModelVersion:
        """The version. Raises MODEL_NOT_FOUND for any other digest."""
        if digest != self._digest:
            shown = digest[:80]
            raise CallError("MODEL_NOT_FOUND", f"there is no version {shown!r}", metadata={"model": shown})
        return await self.resolve("sim")


class SwarmWorker(WorkerApp):
    """A worker whose engines are in this process."""

    def __init__(self, settings: SwarmSettings, port: int) -> None:
        update = {"port": port, "name": f"{settings.name}-{port}"}
        super().__init__(settings.model_copy(update=update), CollectorRegistry())
        self._version = settings.swarm_version

    def _ports(self, device: Device) -> Ports:
        engines = InlineEngines(SimEngines(self._settings).config)
        return OneVersion(self._version), NoWeights(), engines


class Swarm:
    """All workers, as `tokenloom.kit.service.run` starts and stops them."""

    def __init__(self, settings: SwarmSettings) -> None:
        self._workers = [SwarmWorker(settings, port) for port in split_ports(settings.swarm_ports)]

    async def start(self) -> None:
        """Bind every port. Raises OSError when one is taken."""
        for worker in self._workers:
            await worker.start()

    def readiness(self) -> str:
        """Empty when every worker is ready, else why the first is not."""
        return next((why for worker in self._workers if (why := worker.readiness())), "")

    async def drain(self, grace_s: float) -> None:
        """Drain all at once."""
        await asyncio.gather(*(worker.drain(grace_s) for worker in self._workers))

    async def close(self) -> None:
        """End every worker."""
        await asyncio.gather(*(worker.close() for worker in self._workers))


if __name__ == "__main__":
    run("worker", SwarmSettings, Swarm)
