"""Which models are resident here, and how they get there: reserve memory, fetch, load, serve, leave.

Entries of the settings are resolved again and again until the modelstore knows them; a version asked for
by rpc must exist. A load that began goes on when its caller leaves, and a second caller waits for the same
one. Who leaves for whom, who waits and who is refused, `residency.py` decides; here its decisions are
carried out. A model's files are fetched while others still leave for it; its engine starts when its
memory is reserved, and that is given back when the engine's process is gone. Bounds: `models_max` at
once, `evict_grace_s` for the sequences of an evicted model, `failed_keep_s` for the memory of a failure
and until a model of the settings is tried again, `resolve_backoff_max_s` between questions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.worker.front.engine import Engine
from services.worker.front.memory import Budget
from services.worker.front.ports import Engines, Launch, ModelStore, ModelVersion, Weights
from services.worker.front.refusals import (
    leaves,
    not_admitted,
    not_on_demand,
    not_resident,
    too_large_together,
    waits_for_memory,
)
from services.worker.front.reservation import Reservation, in_words
from services.worker.front.residency import Admitted, Residency, Use
from services.worker.front.resident import Resident, Stage
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

RESOLVE_BACKOFF_FIRST_S = 0.1

log = get_logger(__name__)

MakeEngine = Callable[[ModelVersion, Launch], Engine]


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """The bounds of what is resident, from the settings."""

    models_max: int
    resolve_backoff_max_s: float
    min_dwell_s: float
    evict_grace_s: float
    failed_keep_s: float
    loads_on_demand: bool = True


class Models:
    """Every model of this worker, by version digest."""

    def __init__(
        self,
        *,
        store: ModelStore,
        weights: Weights,
        engines: Engines,
        make_engine: MakeEngine,
        budget_bytes: int,
        bounds: ModelBounds,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`budget_bytes`: for all engines together; 0: no bound."""
        self.bounds = bounds
        self._store = store
        self._weights = weights
        self._engines = engines
        self._make_engine = make_engine
        self._clock = clock
        self._changed = changed
        self._residency = Residency(
            Budget(budget_bytes), models_max=bounds.models_max, min_dwell_s=bounds.min_dwell_s
        )
        self._residents: dict[str, Resident] = {}
        self._wanted: dict[str, str] = {}
        self._sole = False
        self._obtaining: set[asyncio.Task[None]] = set()

    @property
    def budget_bytes(self) -> int:
        """For all engines together; 0: no bound."""
        return self._residency.budget.total_bytes

    @property
    def free_bytes(self) -> int:
        """What of the budget nobody has reserved, or waits for."""
        return self._residency.unpromised_bytes

    def get(self, digest: str) -> Resident | None:
        """The resident of this version, in whatever stage."""
        return self._residents.get(digest)

    def all(self) -> Iterable[Resident]:
        """Every resident, oldest first."""
        return self._residents.values()

    def start(self, entries: Iterable[str]) -> None:
        """Make the entries of the settings resident, as soon as the modelstore knows them."""
        for entry in entries:
            self._want(entry)
        self._sole = len(self._obtaining) == 1

    def missing(self) -> str:
        """Empty when every model of the settings is ready, else one line that names one that is not.

        What failed for good comes first, and begins with `failed: `.
        """
        configured = [resident for resident in self._residents.values() if resident.configured]
        for resident in configured:
            if resident.stage is Stage.FAILED and not resident.tried_again:
                return f"failed: model {resident.version.name}: {resident.error}"
        for why in sorted(self._wanted.values(), key=lambda why: not why.startswith("failed: ")):
            return why
        for resident in configured:
            stage = resident.stage
            if stage is Stage.FAILED:
                return f"model {resident.version.name}: {resident.error}; it is tried again"
            if stage is Stage.LOADING and not resident.granted.is_set():
                return waits_for_memory(resident.version.name, self._names_leaving())
            if stage in (Stage.FETCHING, Stage.LOADING):
                return f"model {resident.version.name} is {stage.value}, {resident.progress:.0%} done"
        return ""

    async def load(self, digest: str, *, evict: bool = False) -> Resident:
        """Make a version resident and return once it can serve. Raises CallError when it cannot."""
        resident = await self._begun(digest, evict=evict)
        await resident.settled.wait()
        if resident.error is not None:
            raise resident.error
        return resident

    async def unload(self, digest: str) -> None:
        """End a version's engine once its sequences are done. Raises MODEL_NOT_FOUND."""
        resident = self._residents.get(digest)
        if resident is None:
            raise not_resident(digest)
        if self._residency.place(digest) is not None:
            self._residency.leave(digest)
        await asyncio.shield(self._send_off(resident))

    async def close(self) -> None:
        """End every load and every engine."""
        of_models = [task for r in self._residents.values() for task in (r.life, r.leaving)]
        tasks = [task for task in (*self._obtaining, *of_models) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(r.engine.stop() for r in self._residents.values()))
        self._residents.clear()

    async def _begun(
        self,
        digest: str,
        version: ModelVersion | None = None,
        *,
        evict: bool = False,
        configured: bool = False,
    ) -> Resident:
        """The version's load, begun by this call or before. `version`: when the store was asked already."""
        while True:
            known = self._residents.get(digest)
            if known is not None and known.leaving is not None:
                await asyncio.wait({known.leaving})
            elif known is not None and known.stage is not Stage.FAILED:
                known.configured = known.configured or configured
                return known
            elif known is not None and not known.released.is_set():
                await known.released.wait()
            elif version is not None:
                return self._begin(version, evict=evict, configured=configured)
            elif not self.bounds.loads_on_demand:
                raise not_on_demand(digest)
            else:
                version = await self._store.get_version(digest)

    def _want(self, entry: str) -> None:
        self._wanted[entry] = f"model {entry}: not asked for yet"
        task = asyncio.create_task(self._obtain(entry), name=f"obtain {entry}")
        self._obtaining.add(task)
        task.add_done_callback(self._obtaining.discard)

    async def _obtain(self, entry: str) -> None:
        pause_s, said = RESOLVE_BACKOFF_FIRST_S, ""
        while True:
            try:
                version = await self._store.resolve(entry)
                await self._begun(version.digest, version, configured=True)
            except CallError as error:
                hopeless = error.reason == "MODEL_TOO_LARGE"
                self._wanted[entry] = f"{'failed: ' if hopeless else ''}model {entry}: {error.message}"
                if said != error.message:
                    said = error.message
                    tell = log.error if hopeless else log.warning
                    tell("model not to be had", model=entry, reason=error.reason, why=said)
                    self._changed()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self.bounds.resolve_backoff_max_s)
            else:
                del self._wanted[entry]
                self._changed()
                return

    def _begin(self, version: ModelVersion, *, evict: bool = False, configured: bool = False) -> Resident:
        """Reserve memory for a version, or a place among those who wait for it. Raises CallError."""
        reservation = self._engines.reserve(version, self.budget_bytes, whole=configured and self._sole)
        if configured:
            self._check_together(version, reservation)
        answer = self._admit(version, reservation, evict, configured)
        self._forget(version.digest)
        engine = self._make_engine(version, self._engines.launcher(version, reservation))
        dwell_s = self.bounds.min_dwell_s
        resident = Resident(version, engine, reservation, min_dwell_s=dwell_s, configured=configured)
        self._residents[version.digest] = resident
        for victim in (*answer.evict, *answer.hurry):
            self._residents[victim].hurried.set()
            self._send_off(self._residents[victim])
        if answer.held:
            resident.granted.set()
        resident.life = asyncio.create_task(self._live(resident), name=f"load {version.name}")
        self._changed()
        return resident

    def _check_together(self, version: ModelVersion, reservation: Reservation) -> None:
        """Raises MODEL_TOO_LARGE when the models of the settings can never all be here."""
        others = [r for r in self._residents.values() if r.configured and r.stage is not Stage.FAILED]
        sizes = {r.version.name: r.reservation.total_bytes for r in others}
        if self.budget_bytes and sizes and reservation.total_bytes <= self.budget_bytes:
            sizes[version.name] = reservation.total_bytes
            if sum(sizes.values()) > self.budget_bytes:
                raise too_large_together(sizes, self.budget_bytes)

    def _admit(
        self, version: ModelVersion, reservation: Reservation, evict: bool, configured: bool
    ) -> Admitted:
        """Raises MODEL_TOO_LARGE or MODEL_MEMORY_BUSY."""
        bounds, evict = self.bounds, evict or configured

        def use_of(other: str) -> Use:
            # What the settings name has the memory before what came by command, and not before its like.
            known = self._residents[other]
            return Use() if configured and known.configured else known.use

        answer = self._residency.ask(
            version.digest,
            reservation.total_bytes,
            evict=evict,
            now_s=self._clock.monotonic(),
            use_of=use_of,
        )
        if not isinstance(answer, Admitted):
            most, dwell_s = bounds.models_max, bounds.min_dwell_s
            raise not_admitted(
                version, reservation, answer, evict=evict, models_max=most, min_dwell_s=dwell_s
            )
        log.info(
            "model is to be loaded",
            model=version.name,
            version=version.digest,
            reserves=in_words(reservation.total_bytes),
            of_which=str(reservation),
            left=in_words(self.free_bytes),
            evicts=[self._residents[victim].version.name for victim in answer.evict],
        )
        return answer

    async def _live(self, resident: Resident) -> None:
        """From the first byte until it fails for good; who sends it off ends this."""
        version = resident.version
        try:
            await self._bring(resident)
            log.info("model ready", model=version.name, version=version.digest)
            resident.settled.set()
            self._changed()
            await resident.engine.given_up()
        except CallError as error:
            resident.failure = error
            if resident.fetching:
                log.error("model failed", model=version.name, reason=error.reason, error=error.message)
        except OSError as error:
            why = f"cannot keep the files of {version.name}: {error}"
            resident.failure = CallError("MODEL_LOAD_FAILED", why, metadata={"model": version.name})
            log.error("model failed", model=version.name, error=why)
        except asyncio.CancelledError:
            if not resident.settled.is_set():
                resident.failure = not_resident(version.digest)
            raise
        finally:
            resident.settled.set()
        await resident.engine.stop()
        self._release(resident)
        self._bound_failures()
        if resident.configured and not resident.tried_again:
            return
        await asyncio.sleep(self.bounds.failed_keep_s)
        if self._residents.get(version.digest) is resident:
            del self._residents[version.digest]
            if resident.configured:
                self._want(f"{version.name}@{version.digest}")
            self._changed()

    async def _bring(self, resident: Resident) -> None:
        """Files, memory, engine. Raises CallError or OSError."""

        def progress(fraction: float) -> None:
            resident.fetched = fraction
            self._changed()

        may_leave = not resident.granted.is_set()
        try:
            folder = await self._weights.folder(resident.version, progress)
        except CallError as error:
            if not may_leave or error.reason != "MODEL_MEMORY_BUSY":
                raise
            # No room on the disk beside the files of those that leave for it: theirs go when they are gone.
            await resident.granted.wait()
            folder = await self._weights.folder(resident.version, progress)
        resident.fetching = False
        self._changed()
        await resident.granted.wait()
        resident.engine.start(folder)
        await resident.engine.wait_ready()

    def _send_off(self, resident: Resident) -> asyncio.Task[None]:
        """It takes no new sequences and goes when the present ones have ended."""
        if resident.leaving is None:
            resident.draining = True
            name = f"unload {resident.version.name}"
            resident.leaving = asyncio.create_task(self._leave(resident), name=name)
            self._changed()
        return resident.leaving

    async def _leave(self, resident: Resident) -> None:
        if resident.life is not None:
            resident.life.cancel()
            await asyncio.wait({resident.life})
        await self._drain(resident)
        await resident.engine.stop()
        if self._residents.get(resident.version.digest) is resident:
            del self._residents[resident.version.digest]
        log.info("model unloaded", model=resident.version.name, version=resident.version.digest)
        self._release(resident)

    async def _drain(self, resident: Resident) -> None:
        """Until its sequences have ended: as long as they take, or, when others wait, for a grace."""
        engine = resident.engine
        ended = asyncio.create_task(engine.idle())
        hurried = asyncio.create_task(resident.hurried.wait())
        error = leaves(resident.version.name, engine.worker)
        try:
            await asyncio.wait({ended, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                engine.hand_back(error, waiting_only=True)
                await asyncio.wait({ended}, timeout=self.bounds.evict_grace_s)
            if not ended.done():
                count = engine.hand_back(error)
                log.info("sequences handed back", model=resident.version.name, count=count)
        finally:
            ended.cancel()
            hurried.cancel()

    def _release(self, resident: Resident) -> None:
        """Its process is gone: its memory is for those who wait, and its files may leave the disk."""
        if not resident.released.is_set():
            resident.released.set()
            for digest in self._residency.gone(resident.version.digest):
                self._residents[digest].granted.set()
            self._weights.release(resident.version.digest)
        self._changed()

    def _forget(self, digest: str) -> None:
        """A failure makes way for another try."""
        known = self._residents.pop(digest, None)
        if known is not None and known.life is not None:
            known.life.cancel()

    def _bound_failures(self) -> None:
        failed = [r for r in self._residents.values() if r.released.is_set() and not r.configured]
        for resident in failed[: -self.bounds.models_max]:
            self._forget(resident.version.digest)

    def _names_leaving(self) -> list[str]:
        return [r.version.name for r in self._residents.values() if r.stage is Stage.DRAINING]
