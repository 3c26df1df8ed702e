"""Keeps one model's engine process alive and hands its steps to the sequences they belong to.

One process lives at a time. When it dies, the sequences that it held end with ENGINE_RESTARTED, those
that only waited for it are refused as well, and another process is started after a bounded pause. A
model that fails to load ends as FAILED: at once when the engine says that trying again will not help,
otherwise after `load_attempts_max` starts.

Bounds: `restart_backoff_max_s` between starts, `load_timeout_s` for a start, `silence_max_s` for an
engine that holds sequences, `STOP_GRACE_S` for an end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from services.worker.front.admission import Admission, Offer
from services.worker.front.ports import EngineLink, Launch
from services.worker.front.prefixes import Prefixes
from services.worker.front.sequence import Sequence
from services.worker.front.served import ServedTokens
from services.worker.front.tally import Tally
from services.worker.protocol import Cancel, Event, Failed, Load, Progress, Ready, Shutdown, Step
from tokenloom.kit.clock import Clock
from tokenloom.kit.errors import REASONS, CallError
from tokenloom.kit.logs import get_logger

STOP_GRACE_S = 5.0
"""From `Shutdown` until the process is killed."""
BACKOFF_FIRST_S = 0.1
LOOK_EVERY_S = 1.0
"""Between two looks at whether the process is overdue."""
STEADY_S = 30.0
"""A life of this length clears the record of earlier deaths."""
PERMANENT = frozenset({"MODEL_UNSUPPORTED", "MODEL_TOO_LARGE", "FIELD_INVALID", "SOURCE_INVALID"})
"""Reasons of a failed load that another start cannot mend."""

log = get_logger(__name__)


class EngineState(Enum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineBounds:
    """The bounds of one engine, from the settings."""

    restart_backoff_max_s: float
    load_attempts_max: int
    load_timeout_s: float
    silence_max_s: float


def backoff_s(deaths: int, max_s: float) -> float:
    """The pause before the next start, after this many deaths in a row."""
    return float(min(max_s, BACKOFF_FIRST_S * 2 ** min(deaths - 1, 30)))


class Engine:
    """One model's engine, across all lives of its process."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        launch: Launch,
        admission: Admission,
        clock: Clock,
        bounds: EngineBounds,
        changed: Callable[[], None],
    ) -> None:
        self.model = model
        self.admission = admission
        self.tally = Tally()
        self.served = ServedTokens()
        self.prefixes = Prefixes()
        self.state = EngineState.LOADING
        self.ready: Ready | None = None
        """What the engine said about itself when it last became ready."""
        self.progress = 0.0
        self.error: CallError | None = None
        self.restarts = 0
        self.ready_s: float | None = None
        """When it could serve for the first time, by the clock's monotonic seconds."""
        self.started_s: float | None = None
        """When its last sequence came."""
        self.ended_s: float | None = None
        """When its last sequence ended, or its caller left."""
        self.worker = worker
        """Where it runs, for messages."""
        self._launch = launch
        self._clock = clock
        self._bounds = bounds
        self._changed = changed
        self._moved = asyncio.Event()
        self._link: EngineLink | None = None
        self._failed: Failed | None = None
        self._heard_s = 0.0
        self._untold: deque[tuple[int, int]] = deque()
        """(when, tokens) of sequences that were sent and that no step's load holds yet."""
        self._settled = asyncio.Event()
        self._gave_up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, folder: str) -> None:
        """Begin to keep an engine running on the files in `folder`."""
        self._task = asyncio.create_task(self._supervise(folder), name=f"engine {self.model}")

    async def wait_ready(self) -> None:
        """Return when it can serve. Raises the CallError of a load that failed for good."""
        await self._settled.wait()
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        """End the process; sequences that are still there are lost."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait({self._task})
        self.state = EngineState.STOPPED
        self._settled.set()

    async def given_up(self) -> None:
        """Raise the CallError of an engine that failed for good; until then, wait."""
        await self._gave_up.wait()
        if self.error is not None:
            raise self.error

    async def idle(self) -> None:
        """Return when no sequence is held or queued."""
        while self.busy:
            self._moved.clear()
            await self._moved.wait()

    @property
    def busy(self) -> bool:
        """Whether a sequence is held or queued."""
        return bool(self.admission.active or self.admission.queued)

    def now_s(self) -> float:
        """The time by which `ready_s` and the others are told."""
        return self._clock.monotonic()

    def hand_back(self, error: CallError, *, waiting_only: bool = False) -> int:
        """End every sequence, or all that were not begun, with a reason to send it again; how many."""
        held = [] if waiting_only else list(self.admission.active.values())
        for sequence in (back := [*self.admission.queue, *held]):
            sequence.fail(error)
            if self.admission.leave(sequence.key) and self._link is not None:
                self._link.send(Cancel(sequence.key))
        self._note()
        return len(back)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens that are not computed yet, those on their way to the engine too."""
        return self.admission.load.queued_prefill_tokens + sum(tokens for _, tokens in self._untold)

    def submit(self, sequence: Sequence) -> Offer:
        """Start a sequence, queue it, or say that it does not fit."""
        offer = self.admission.offer(sequence)
        if offer is Offer.START and not self._send(sequence):
            self.admission.leave(sequence.key)
            return Offer.FULL
        if offer is not Offer.FULL:
            self.started_s = self._clock.monotonic()
        if offer is Offer.QUEUE or (offer is Offer.START and not sequence.leased):
            # Whoever gave a lease counts it already; the others learn of it with the next report.
            self._note()
        return offer

    def cancel(self, sequence: Sequence) -> None:
        """The caller left: the engine forgets the sequence before its next step."""
        self.ended_s = self._clock.monotonic()
        if self.admission.leave(sequence.key) and self._link is not None:
            self._link.send(Cancel(sequence.key))
        self._admit(self.admission.admit())
        self._note()

    def _note(self) -> None:
        self._moved.set()
        self._changed()

    def _send(self, sequence: Sequence) -> bool:
        submit, sequence.submit = sequence.submit, None
        assert submit is not None, "a sequence is submitted once"
        sequence.submitted_ns = self._clock.unix_ns()
        self._untold.append((sequence.submitted_ns, sequence.length))
        if len(self.admission.active) == 1:
            self._heard_s = self._clock.monotonic()
        return self._link is not None and self._link.send(submit)

    def _admit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if not self._send(sequence):
                self.admission.leave(sequence.key)
                sequence.fail(self._restarted("the engine takes no commands"))

    def _on_event(self, event: Event) -> None:
        self._heard_s = self._clock.monotonic()
        if isinstance(event, Step):
            self._on_step(event)
        elif isinstance(event, Ready):
            self.ready, self.state, self.progress, self.error = event, EngineState.READY, 1.0, None
            if self.ready_s is None:
                self.ready_s = self._heard_s
            self._settled.set()
            self.prefixes.begin(event.total_blocks)
            self._admit(self.admission.open(event))
            self._note()
        elif isinstance(event, Progress):
            self.progress = min(max(event.fraction, 0.0), 1.0)
            self._note()
        else:
            self._failed = event

    def _on_step(self, step: Step) -> None:
        now_ns = self._clock.unix_ns()
        active = self.admission.active
        ended = continued = tokens = 0
        for output in step.outputs:
            sequence = active.get(output.id)
            if sequence is None:
                continue
            if output.finish:
                del active[output.id]
                ended += 1
                if output.finish == "error":
                    sequence.fail(self._given_up(sequence, output.error))
                    continue
            tokens += len(output.tokens)
            if sequence.received:
                continued += 1
                sequence.push(output, now_ns)
            else:
                sequence.push(output, now_ns)
                self.tally.began(sequence)
        self.tally.step(tokens, continued, now_ns)
        if step.prefixes_stored or step.prefixes_evicted:
            self.prefixes.apply(step.prefixes_stored, step.prefixes_evicted)
        admission = self.admission
        before = admission.load
        admission.settle(step.load)
        self._forget_told(now_ns - step.step_ns)
        if admission.queued:
            self._admit(admission.admit())
        if ended or self._has_step_room(before, step.load):
            self._note()

    def _has_step_room(self, before: Load, after: Load) -> bool:
        """Whether the next step has room for a prompt since now: whoever sends prompts waits for that."""
        most = self.ready.step_tokens_max if self.ready is not None else 0
        return after.queued_prefill_tokens < most <= before.queued_prefill_tokens

    def _forget_told(self, begun_ns: int) -> None:
        """The engine's own numbers hold everything that was sent before its step began."""
        while self._untold and self._untold[0][0] < begun_ns:
            self._untold.popleft()

    async def _supervise(self, folder: str) -> None:
        deaths = 0
        while not self._stopping.is_set():
            began_s = self._clock.monotonic()
            cause, was_ready = await self._live(folder)
            self._bury(cause)
            if self._stopping.is_set():
                return
            deaths = 1 if self._clock.monotonic() - began_s > STEADY_S else deaths + 1
            if self._gives_up(was_ready, deaths, cause):
                return
            self.restarts += 1
            pause_s = backoff_s(deaths, self._bounds.restart_backoff_max_s)
            log.warning("engine ended, starting again", model=self.model, cause=cause, pause_s=pause_s)
            await self._stopped_within(pause_s)

    async def _live(self, folder: str) -> tuple[str, bool]:
        """One process from start to end: how it ended, and whether it ever was ready."""
        self.state, self._failed, self.progress = EngineState.LOADING, None, 0.0
        self._note()
        try:
            link = await self._launch(folder, self._on_event)
        except OSError as error:
            return f"cannot start the engine process: {error}", False
        self._link = link
        log.info("engine started", model=self.model, pid=link.pid)
        started_s = self._heard_s = self._clock.monotonic()
        stopping = asyncio.create_task(self._stopping.wait())
        either: set[asyncio.Future[Any]] = {link.ended, stopping}
        try:
            overdue = ""
            while not link.ended.done() and not self._stopping.is_set():
                await asyncio.wait(either, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                if not link.ended.done() and (overdue := self._overdue(started_s)):
                    link.kill()
            if not link.ended.done():
                # One that loads reads no commands.
                if self.state is EngineState.READY:
                    link.send(Shutdown())
                    await asyncio.wait({link.ended}, timeout=STOP_GRACE_S)
                link.kill()
            return overdue or await link.ended, self.state is EngineState.READY
        finally:
            stopping.cancel()
            link.kill()

    def _overdue(self, started_s: float) -> str:
        """Why the process must be killed, if it must."""
        now_s = self._clock.monotonic()
        if self.state is EngineState.LOADING and now_s - started_s > self._bounds.load_timeout_s:
            return f"not ready after load_timeout_s ({self._bounds.load_timeout_s:g})"
        if self.admission.active and now_s - self._heard_s > self._bounds.silence_max_s:
            return f"silent for silence_max_s ({self._bounds.silence_max_s:g}) with sequences running"
        return ""

    def _bury(self, cause: str) -> None:
        """The process is gone: tell everyone who counted on it."""
        self._link = None
        self._untold.clear()
        held, waiting = self.admission.shut()
        self.prefixes.end()
        self.state = EngineState.STOPPED if self._stopping.is_set() else EngineState.LOADING
        self.progress = 0.0
        for sequence in held + waiting:
            sequence.fail(self._restarted(cause))
        self._note()

    def _gives_up(self, was_ready: bool, deaths: int, cause: str) -> bool:
        if was_ready:
            return False
        failed = self._failed
        permanent = failed is not None and failed.reason in PERMANENT
        if not permanent and (self.ready is not None or deaths < self._bounds.load_attempts_max):
            return False
        if failed is not None and failed.reason in REASONS:
            self.error = CallError(failed.reason, failed.message, metadata=failed.metadata)
        else:
            why = f"the engine of {self.model} did not start: {cause}"
            self.error = CallError("MODEL_LOAD_FAILED", why, metadata={"model": self.model, "cause": cause})
        self.state = EngineState.FAILED
        log.error("model failed", model=self.model, reason=self.error.reason, error=str(self.error))
        self._settled.set()
        self._gave_up.set()
        self._note()
        return True

    async def _stopped_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    def _restarted(self, cause: str) -> CallError:
        message = f"the engine of {self.model} ended ({cause}); the same request may be sent again"
        return CallError("ENGINE_RESTARTED", message, metadata={"worker": self.worker, "cause": cause})

    def _given_up(self, sequence: Sequence, why: str) -> CallError:
        """The engine would not run a sequence that was sent to it."""
        why = why or "the engine cannot hold it"
        if sequence.started:
            return self._restarted(why)
        message = f"the engine of {self.model} did not take the sequence: {why}"
        return CallError("WORKER_FULL", message, metadata={"worker": self.worker})
