"""Steps of a given kind on a real engine: so many decodes at a context, a chunk of a prompt, or both.

Contexts cost nothing to make: a sequence is admitted as if all but its last tokens were computed, and its
blocks hold whatever they do (zeros at first), which takes as long to read as anything else. All else is the
path that requests take: plan, layout, launch, draw, settle, tell, one step ahead where the engine works so.
No prefix is looked for or kept, as blocks do not hold what their tokens say.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from services.worker.bench.calibrate_fit import Work
from services.worker.bench.calibrate_grid import AT_ONCE, WARM_UPS, Point
from services.worker.bench.drive import STILL_STEPS_MAX, Stuck
from services.worker.bench.stepper import Stepper
from services.worker.core.plan import Advance, Limits, Plan
from services.worker.core.pressure import Pressure
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Sequence as Tokens
from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.loader import LoadedModel
from services.worker.protocol import Sampling, Submit

UNBOUNDED = 1 << 30


@dataclass(frozen=True, slots=True)
class Measured:
    """A point and its steps: the median time from one step's end to the next one's."""

    point: Point
    work: Work
    steps: int
    step_s: float
    least_s: float
    most_s: float


class Placed(Scheduler):
    """Admits named sequences as if all but their last tokens were computed, and notes what each step was."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits, prefix_cache=False)
        self.settled: deque[Work] = deque(maxlen=STILL_STEPS_MAX)
        """Of the steps settled since they were last looked at, oldest first."""
        self._pending: dict[str, int] = {}

    def place(self, name: str, pending: int) -> None:
        """All but `pending` tokens of this sequence will be there already; told before it is added."""
        self._pending[name] = pending

    def bound(self, step_tokens: int) -> None:
        """From now on a step has so many tokens at most."""
        self._pressure = Pressure(step_tokens, self.limits.sequences_max)

    def settle(self, plan: Plan, tokens: Sequence[int], now_ns: int) -> list[Advance]:
        self.settled.append(work_of(plan))
        return super().settle(plan, tokens, now_ns)

    def _admit(self, now_ns: int) -> Tokens | None:
        sequence = super()._admit(now_ns)
        if sequence is not None and sequence.id in self._pending:
            sequence.computed = len(sequence.tokens) - self._pending.pop(sequence.id)
        return sequence


def work_of(plan: Plan) -> Work:
    """What a planned step computes."""
    prompts = plan.chunks[plan.decodes :]
    return Work(
        tokens=plan.tokens,
        kv_tokens=sum(chunk.start + 1 for chunk in plan.chunks[: plan.decodes]),
        pairs=sum(chunk.count * (chunk.start + chunk.count / 2) for chunk in prompts),
        sequences=len(plan.chunks),
    )


class PlacedEngine(Engine):
    """An engine whose sequences may begin in their middle."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, clock_ns: Callable[[], int]) -> None:
        super().__init__(loaded, config, clock_ns)
        self._scheduler: Placed = Placed(self.limits)

    @property
    def placed(self) -> Placed:
        return self._scheduler


class Meter:
    """Measures points one after the other; nothing of one is left when the next begins."""

    def __init__(
        self,
        engine: PlacedEngine,
        stepper: Stepper,
        steps: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._stepper, self._steps, self._clock = engine, stepper, steps, clock
        self._vocab = engine.ready().vocab_size
        self._submitted = 0

    def measure(self, point: Point) -> Measured:
        """Raises Stuck, and ValueError when the engine's steps were not such ones."""
        names = self._fill(point)
        took_s: list[float] = []
        self._engine.placed.settled.clear()
        for _ in range(WARM_UPS):
            self._step()
        ended_s = self._clock()
        works = []
        for _ in range(self._steps):
            works.append(self._step())
            began_s, ended_s = ended_s, self._clock()
            took_s.append(ended_s - began_s)
        self._empty(names)
        wanted = (point.tokens, point.decodes + bool(point.chunk))
        if any((work.tokens, work.sequences) != wanted for work in works):
            raise ValueError(f"{wanted[0]} tokens of {wanted[1]} sequences were to be a step: {works[0]}")
        return Measured(point, Work.mean(works), len(took_s), median(took_s), min(took_s), max(took_s))

    def _fill(self, point: Point) -> list[str]:
        """Decodes first, so that they are there when the first prompt is; then a prompt for each step."""
        self._engine.placed.bound(point.tokens)
        first = max(1, point.context - WARM_UPS - self._steps // 2)
        names = [self._submit(first, 1, UNBOUNDED) for _ in range(point.decodes)]
        if point.chunk:
            length, count = point.before + point.chunk, WARM_UPS + self._steps + AT_ONCE
            names += [self._submit(length, point.chunk, 1) for _ in range(count)]
        return names

    def _submit(self, length: int, pending: int, max_new_tokens: int) -> str:
        self._submitted += 1
        name = f"calibrate-{self._submitted}"
        # Spread over the vocabulary: equal rows would be easier on the caches than those of real prompts.
        ids = [(self._submitted + 7919 * number) % self._vocab for number in range(length)]
        self._engine.placed.place(name, pending)
        refused = self._engine.submit(Submit(name, ids, [], max_new_tokens, 0, [], Sampling(temperature=0.0)))
        if refused is not None:
            raise ValueError(f"a sequence of {length} tokens was refused: {refused.error or refused.finish}")
        return name

    def _step(self) -> Work:
        """The next step that ends."""
        for _ in range(STILL_STEPS_MAX):
            if self._stepper.step().step_tokens:
                return self._engine.placed.settled.popleft()
        raise Stuck(f"{STILL_STEPS_MAX} steps did nothing")

    def _empty(self, names: list[str]) -> None:
        for name in names:
            self._engine.cancel(name)
        for _ in range(STILL_STEPS_MAX):
            if self._engine.idle:
                return
            self._stepper.step()
        raise Stuck("all sequences were cancelled, and the engine goes on")
