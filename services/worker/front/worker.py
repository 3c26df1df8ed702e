"""The worker as its servicer sees it: who may begin, what ends them, drain, and the load report.

It decides by state only and sends nothing itself. Order of refusals: DRAINING, MODEL_NOT_FOUND,
WORKER_FULL; each comes before anything was sent, so that the call can move to another worker.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable

from services.worker.front.admission import Offer
from services.worker.front.models import Models
from services.worker.front.refusals import not_resident
from services.worker.front.report import Report, ReportBuilder
from services.worker.front.resident import Resident, Stage
from services.worker.front.sequence import Sequence
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import CallError

HAND_BACK_S = 2.0
"""After a drain's grace: how long the last refusals may take to leave."""


class Worker:
    """All sequences of all models of one worker."""

    def __init__(
        self,
        *,
        endpoint: str,
        models: Models,
        reports: ReportBuilder,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        """`ip:port` under which batcher and Envoy know this worker."""
        self.models = models
        self.draining = False
        self._reports = reports
        self._clock = clock
        self._changed = changed
        self._keys = itertools.count(1)
        self._held: dict[str, tuple[Sequence, Resident]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def held(self) -> Iterable[Sequence]:
        """Every sequence that is running, waiting, or being read to its end."""
        return [sequence for sequence, _ in self._held.values()]

    def next_key(self) -> str:
        """A name for a sequence towards its engine. Request ids may repeat, these do not."""
        return str(next(self._keys))

    async def load(self, digest: str, *, evict: bool) -> Resident:
        """As Models.load, but nothing more comes to a worker that goes. Raises DRAINING too."""
        if self.draining:
            raise self._draining()
        return await self.models.load(digest, evict=evict)

    def choose(self, digest: str) -> Resident:
        """The resident that serves this version. Raises DRAINING, MODEL_NOT_FOUND or WORKER_FULL."""
        if self.draining:
            raise self._draining()
        resident = self.models.get(digest)
        if resident is None:
            raise not_resident(digest)
        if resident.stage is not Stage.READY:
            why = f"is {resident.stage.value}" if resident.error is None else f"failed: {resident.error}"
            raise self._full(f"model {resident.version.name} {why}")
        return resident

    def begin(self, resident: Resident, sequence: Sequence) -> None:
        """Start or queue a sequence, which must be given to `end` afterwards. Raises WORKER_FULL."""
        if resident.engine.submit(sequence) is Offer.FULL:
            kind = "no place for a leased sequence" if sequence.leased else "its waiting line is full"
            raise self._full(f"model {resident.version.name}: {kind}")
        self._held[sequence.key] = (sequence, resident)
        self._idle.clear()

    def end(self, sequence: Sequence) -> None:
        """The caller has everything, or left: the engine forgets the sequence if it still runs."""
        entry = self._held.pop(sequence.key, None)
        if entry is None:
            return
        entry[1].engine.served.count(sequence)
        entry[1].engine.cancel(sequence)
        if not self._held:
            self._idle.set()

    def expire(self, sequence: Sequence) -> None:
        """Its deadline passed."""
        self._break_off(sequence, CallError("DEADLINE_EXCEEDED", "the request's deadline passed"))

    async def drain(self, grace_s: float) -> int:
        """Refuse what comes, let what runs end, and hand back what does not within `grace_s`.

        Returns how many sequences were handed back.
        """
        self.draining = True
        self._changed()
        for sequence in self.held:
            if sequence.submit is not None:
                self._break_off(sequence, self._draining())
        if await self._idle_within(grace_s):
            return 0
        remaining = self.held
        for sequence in remaining:
            self._break_off(sequence, self._draining())
        await self._idle_within(HAND_BACK_S)
        return len(list(remaining))

    def report(self) -> Report:
        """The next load report."""
        return self._reports.build(
            residents=self.models.all(),
            held=self._held.values(),
            draining=self.draining,
            unix_ms=self._clock.unix_ms(),
        )

    def _break_off(self, sequence: Sequence, error: CallError) -> None:
        entry = self._held.get(sequence.key)
        if entry is not None:
            sequence.fail(error)
            entry[1].engine.cancel(sequence)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _draining(self) -> CallError:
        message = f"worker {self.endpoint} is draining; send the request to another"
        return CallError("DRAINING", message, metadata={"service": "worker"})

    def _full(self, why: str) -> CallError:
        message = f"worker {self.endpoint} cannot take the sequence: {why}"
        return CallError("WORKER_FULL", message, metadata={"worker": self.endpoint})
