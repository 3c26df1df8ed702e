"""Which models are resident here, and how they get there: fetch, load, serve, unload.

Entries of the settings are resolved again and again until the modelstore knows them; a version asked
for by rpc must exist. A load that began goes on when its caller leaves, and a second caller waits for
the same one. Bounds: `models_max` versions at once, `resolve_backoff_max_s` between questions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum

from services.worker.front.engine import Engine, EngineState
from services.worker.front.ports import Engines, Launch, ModelStore, ModelVersion, Weights
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

RESOLVE_BACKOFF_FIRST_S = 0.1

log = get_logger(__name__)

MakeEngine = Callable[[ModelVersion, Launch], Engine]


class Stage(Enum):
    """A model's life on this worker."""

    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Resident:
    """One version that is resident, or on its way, or failed."""

    def __init__(self, version: ModelVersion, engine: Engine) -> None:
        self.version = version
        self.engine = engine
        self.fetched = 0.0
        """Share of the files that is here, 0 to 1."""
        self.fetching = True
        self.draining = False
        self.failure: CallError | None = None
        self.settled = asyncio.Event()
        """Set when the first load succeeded or failed for good."""
        self.loading: asyncio.Task[None] | None = None
        self.unloading: asyncio.Task[None] | None = None

    @property
    def stage(self) -> Stage:
        """What the load report says of it."""
        if self.failure is not None or self.engine.state is EngineState.FAILED:
            return Stage.FAILED
        if self.draining:
            return Stage.DRAINING
        if self.fetching:
            return Stage.FETCHING
        return Stage.READY if self.engine.state is EngineState.READY else Stage.LOADING

    @property
    def progress(self) -> float:
        """0 to 1 of the present stage."""
        return self.fetched if self.fetching else self.engine.progress

    @property
    def error(self) -> CallError | None:
        """Why it failed, when it did."""
        return self.failure or self.engine.error

    @property
    def context_length(self) -> int:
        """Tokens that prompt and output may be together: the model's bound, and the cache's."""
        ready = self.engine.ready
        if ready is None:
            return self.version.context_length
        return min(ready.context_length, ready.total_blocks * ready.block_tokens)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ready = self.engine.ready
        return self.version.vocab_size if ready is None else ready.vocab_size


class Models:
    """Every model of this worker, by version digest."""

    def __init__(
        self,
        *,
        store: ModelStore,
        weights: Weights,
        engines: Engines,
        make_engine: MakeEngine,
        models_max: int,
        resolve_backoff_max_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._weights = weights
        self._engines = engines
        self._make_engine = make_engine
        self._models_max = models_max
        self._resolve_backoff_max_s = resolve_backoff_max_s
        self._changed = changed
        self._residents: dict[str, Resident] = {}
        self._wanted: dict[str, str] = {}
        self._obtaining: list[asyncio.Task[None]] = []

    def get(self, digest: str) -> Resident | None:
        """The resident of this version, in whatever stage."""
        return self._residents.get(digest)

    def all(self) -> Iterable[Resident]:
        """Every resident, oldest first."""
        return self._residents.values()

    def start(self, entries: Iterable[str]) -> None:
        """Make the entries of the settings resident, as soon as the modelstore knows them."""
        for entry in entries:
            self._wanted[entry] = "not asked for yet"
            self._obtaining.append(asyncio.create_task(self._obtain(entry), name=f"obtain {entry}"))

    def missing(self) -> str:
        """Empty when every model is ready, else one line that names one that is not.

        What failed for good comes first, and begins with `failed: `.
        """
        for resident in self._residents.values():
            if resident.stage is Stage.FAILED:
                return f"failed: model {resident.version.name}: {resident.error}"
        for entry, why in self._wanted.items():
            return f"model {entry}: {why}"
        for resident in self._residents.values():
            stage = resident.stage
            if stage in (Stage.FETCHING, Stage.LOADING):
                return f"model {resident.version.name} is {stage.value}, {resident.progress:.0%} done"
        return ""

    async def load(self, digest: str) -> Resident:
        """Make a version resident and return once it can serve. Raises CallError when it cannot."""
        resident = self._residents.get(digest)
        if resident is None or resident.stage is Stage.FAILED:
            resident = self._ensure(await self._store.get_version(digest))
        await resident.settled.wait()
        if resident.error is not None:
            raise resident.error
        return resident

    async def unload(self, digest: str) -> None:
        """End a version's engine once its sequences are done. Raises MODEL_NOT_FOUND."""
        resident = self._residents.get(digest)
        if resident is None:
            raise not_resident(digest)
        if resident.unloading is None:
            resident.draining = True
            self._changed()
            name = f"unload {resident.version.name}"
            resident.unloading = asyncio.create_task(self._unload(resident), name=name)
        await asyncio.shield(resident.unloading)

    async def close(self) -> None:
        """End every load and every engine."""
        of_models = [task for r in self._residents.values() for task in (r.loading, r.unloading)]
        tasks = [task for task in (*self._obtaining, *of_models) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(r.engine.stop() for r in self._residents.values()))
        self._residents.clear()

    async def _obtain(self, entry: str) -> None:
        pause_s = RESOLVE_BACKOFF_FIRST_S
        while True:
            try:
                self._ensure(await self._store.resolve(entry))
            except CallError as error:
                if self._wanted[entry] != error.message:
                    log.warning(
                        "model not to be had yet", model=entry, reason=error.reason, why=error.message
                    )
                self._wanted[entry] = error.message
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._resolve_backoff_max_s)
            else:
                del self._wanted[entry]
                self._changed()
                return

    def _ensure(self, version: ModelVersion) -> Resident:
        known = self._residents.get(version.digest)
        if known is not None and known.stage is not Stage.FAILED:
            return known
        if known is None and len(self._residents) >= self._models_max:
            why = f"this worker already holds models_max ({self._models_max}) models: unload one first"
            raise CallError("MODEL_TOO_LARGE", why, metadata={"available_bytes": "0"})
        engine = self._make_engine(version, self._engines.launcher(version))
        resident = Resident(version, engine)
        self._residents[version.digest] = resident
        resident.loading = asyncio.create_task(self._load(resident), name=f"load {version.name}")
        self._changed()
        return resident

    async def _load(self, resident: Resident) -> None:
        version = resident.version
        log.info("loading model", model=version.name, version=version.digest)

        def progress(fraction: float) -> None:
            resident.fetched = fraction
            self._changed()

        try:
            folder = await self._weights.folder(version, progress)
            resident.fetching = False
            resident.engine.start(folder)
            await resident.engine.wait_ready()
            log.info("model ready", model=version.name, version=version.digest)
        except CallError as error:
            resident.failure = error
            if resident.fetching:
                log.error("model failed", model=version.name, reason=error.reason, error=error.message)
        except OSError as error:
            why = f"cannot keep the files of {version.name}: {error}"
            resident.failure = CallError("MODEL_LOAD_FAILED", why, metadata={"model": version.name})
            log.error("model failed", model=version.name, error=why)
        except asyncio.CancelledError:
            resident.failure = not_resident(version.digest)
            raise
        finally:
            resident.settled.set()
            self._changed()

    async def _unload(self, resident: Resident) -> None:
        if resident.loading is not None and not resident.settled.is_set():
            resident.loading.cancel()
        await resident.engine.idle()
        await resident.engine.stop()
        if self._residents.get(resident.version.digest) is resident:
            del self._residents[resident.version.digest]
        log.info("model unloaded", model=resident.version.name, version=resident.version.digest)
        self._changed()


def not_resident(digest: str) -> CallError:
    """The refusal for a version that this worker does not have."""
    shown = digest[:80]
    return CallError("MODEL_NOT_FOUND", f"model {shown!r} is not resident here", metadata={"model": shown})
