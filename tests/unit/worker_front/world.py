"""A worker's models with a store, weights and engines that are all in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from services.worker.front.engine import Engine
from services.worker.front.models import ModelBounds, Models
from services.worker.front.ports import Launch, ModelVersion
from services.worker.front.reservation import Reservation
from services.worker.front.resident import Resident
from tests.unit.worker_front.fakes import READY, FakeLaunch, FakeLink, make_engine, until
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import CallError

BOUNDS = ModelBounds(
    models_max=2, resolve_backoff_max_s=0.01, min_dwell_s=100, evict_grace_s=5, failed_keep_s=60
)


def version(letter: str, size_bytes: int = 0) -> ModelVersion:
    """A version that takes so much memory and is called by its letter."""
    return ModelVersion(f"sha256:{letter * 64}", letter, 1000, 512, weight_bytes=size_bytes)


class World:
    """Models in its `models`; what it `known` is what the store has."""

    def __init__(self, models_max: int = 2, *versions: ModelVersion, budget_bytes: int = 0, **bounds: Any):
        found = versions or (version("a"), version("b"))
        self.known = {one.name: one for one in found}
        self.weights_error: CallError | OSError | None = None
        self.may_fetch = asyncio.Event()
        self.may_fetch.set()
        self.launch = FakeLaunch()
        """Of every model."""
        self.folders: set[str] = set()
        """Names of the versions whose files are in use."""
        self.engines: list[Engine] = []
        self.clock = FakeClock()
        self.changes = 0
        self.links: dict[str, FakeLink] = {}
        self.models = Models(
            store=self,
            weights=self,
            engines=self,
            make_engine=self._make_engine,
            budget_bytes=budget_bytes,
            bounds=replace(BOUNDS, models_max=models_max, **bounds),
            clock=self.clock,
            changed=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def _make_engine(self, version: ModelVersion, launch: Launch) -> Engine:
        assert isinstance(launch, FakeLaunch)
        self.engines.append(make_engine(launch, clock=self.clock))
        return self.engines[-1]

    async def resolve(self, model: str) -> ModelVersion:
        if model not in self.known:
            raise CallError("MODEL_NOT_FOUND", f"no model {model}")
        return self.known[model]

    async def get_version(self, digest: str) -> ModelVersion:
        for version in self.known.values():
            if version.digest == digest:
                return version
        raise CallError("MODEL_NOT_FOUND", f"no version {digest}")

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        progress(0.5)
        await self.may_fetch.wait()
        if self.weights_error is not None:
            raise self.weights_error
        self.folders.add(version.name)
        return "/folder"

    def release(self, digest: str) -> None:
        self.folders -= {one.name for one in self.known.values() if one.digest == digest}

    def reserve(self, version: ModelVersion, budget_bytes: int, *, whole: bool) -> Reservation:
        return Reservation(weights_bytes=version.weight_bytes)

    def launcher(self, version: ModelVersion, reservation: Reservation) -> FakeLaunch:
        return self.launch

    async def load(self, version: ModelVersion, *, evict: bool = False) -> Resident:
        """Loads it, its engine being ready at once."""
        loading = asyncio.create_task(self.models.load(version.digest, evict=evict))
        self.links[version.name] = await self.launch.next()
        self.links[version.name].say(READY)
        return await loading

    def resident(self, name: str) -> Resident:
        """One that is here."""
        found = self.models.get(self.known[name].digest)
        assert found is not None, name
        return found

    async def gone(self, name: str) -> None:
        """Its engine process ends as it is told to."""
        link = self.links[name]
        await until(lambda: bool(link.commands) or link.killed)
        link.die("exit status 0")
        await until(lambda: self.models.get(self.known[name].digest) is None)

    async def close(self) -> None:
        closing = asyncio.create_task(self.models.close())
        while not closing.done():
            await asyncio.sleep(0)
            for resident in self.models.all():
                if resident.engine._link is not None:
                    resident.engine._link.kill()
        await closing
