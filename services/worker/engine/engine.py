"""The engine without its process: sequences in, one `Step` of outputs for each step out.

A step is begun (planned and laid out), computed, settled and told. `step()` does all of it; a loop that
computes in another thread may begin the next step meanwhile and tell of the one before, because only
`compute` runs there and it touches nothing that the others change. A step that runs out of memory is
taken back, and the next ones are smaller. No sockets here, and the clock is an argument, so that tests
and benchmarks drive it in their own process.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.worker.core.plan import Advance, Limits, Plan, Verdict
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Finish
from services.worker.engine.config import EngineConfig
from services.worker.engine.history import History
from services.worker.engine.layout import Flat
from services.worker.engine.loader import LoadedModel
from services.worker.engine.rates import Rates
from services.worker.engine.runner import Pending, StepRunner
from services.worker.engine.runners import make_runner
from services.worker.engine.sampling import Drawn
from services.worker.engine.shortage import free_caches, is_shortage
from services.worker.protocol import Load, Output, Ready, Step, Submit
from services.worker.stepping import load_of, output_of, refusal, sequence_of, step_of

Clock = Callable[[], int]
"""Nanoseconds of a monotonic clock."""

GIVEN_UP = "the device's memory does not suffice for this sequence even alone, one token at a time"


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """One step on its way."""

    plan: Plan
    flat: Flat
    histories: list[History]
    began_ns: int

    @property
    def looks_back(self) -> bool:
        """Whether its draws depend on the tokens of the step before, beside being fed by them."""
        return any(history.looks_back for history in self.histories)


@dataclass(frozen=True, slots=True)
class Landing:
    """What a settled step gave, to be told."""

    advances: list[Advance]
    drawn: Drawn
    lost: list[Output]
    """Sequences that were given up."""
    ended_ns: int
    step_ns: int
    tokens: int


class Engine:
    """One model's sequences. Not thread-safe but for `compute`."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, clock_ns: Clock) -> None:
        self._loaded = loaded
        self._clock_ns = clock_ns
        self.limits = Limits(
            total_blocks=loaded.blocks,
            block_tokens=config.block_tokens,
            sequences_max=config.sequences_max,
            step_tokens_max=config.step_tokens_max,
            context_length=min(loaded.shape.context_length, loaded.blocks * config.block_tokens),
            waiting_max=config.waiting_max,
        )
        self._runner: StepRunner = make_runner(loaded, self.limits)
        self._scheduler = Scheduler(
            self.limits, prefix_cache=config.prefix_cache, itl_max_ns=config.itl_max_ms * 1_000_000
        )
        self._histories: dict[str, History] = {}
        self._flights: deque[Flight] = deque()
        self._rates = Rates()
        self._ended_ns = 0

    @property
    def idle(self) -> bool:
        """Whether there is no sequence here, and no step on its way."""
        return not len(self._scheduler) and not self._flights

    @property
    def ahead(self) -> bool:
        """Whether a step can be launched while the one before it computes."""
        return self._runner.ahead

    @property
    def architecture(self) -> str:
        """The model's class."""
        return type(self._loaded.model).__name__

    def ready(self) -> Ready:
        """What the engine says of itself."""
        shape = self._loaded.shape
        cache_bytes = self.limits.total_blocks * self.limits.block_tokens * shape.kv_token_bytes
        return Ready(
            context_length=self.limits.context_length,
            vocab_size=shape.vocab_size,
            sequences_max=self.limits.sequences_max,
            total_blocks=self.limits.total_blocks,
            block_tokens=self.limits.block_tokens,
            memory_bytes=shape.weight_bytes + cache_bytes,
            device=str(self._loaded.device),
            dtype=str(self._loaded.dtype).removeprefix("torch."),
            step_tokens_max=self.limits.step_tokens_max,
        )

    def submit(self, command: Submit) -> Output | None:
        """Queues a sequence; an Output that ends it at once when it cannot run."""
        sequence = sequence_of(command)
        if not all(0 <= token < self._loaded.shape.vocab_size for token in self._named_ids(command)):
            return refusal(command, "a token id is outside the vocabulary")
        verdict = self._scheduler.add(sequence, self._clock_ns())
        if verdict is Verdict.COMPLETE:
            return Output(id=command.id, tokens=[], index=len(command.output), finish=Finish.LENGTH.value)
        if verdict is not Verdict.ACCEPTED:
            return refusal(command, REFUSALS[verdict])
        self._histories[command.id] = History.of(sequence, command.sampling)
        return None

    def cancel(self, sequence_id: str) -> None:
        """Forgets a sequence; its blocks are free once no step on its way writes to them."""
        if self._scheduler.cancel(sequence_id) is not None:
            del self._histories[sequence_id]

    def step(self) -> Step:
        """Computes one step; without outputs when there was nothing to do."""
        flight = self.begin()
        if flight is None:
            return self.now([])
        return self.tell(self.settle(self.compute(flight)))

    def begin(self) -> Flight | None:
        """The next step; None when it depends on one that is on its way, or there is nothing to do."""
        now_ns = self._clock_ns()
        plan = self._scheduler.plan(now_ns)
        if not plan:
            return None
        flat = self._runner.prepare(plan)
        flight = Flight(plan, flat, [self._histories[one.id] for one in flat.sequences], now_ns)
        self._flights.append(flight)
        return flight

    def next(self) -> Flight | None:
        """The oldest step that is not settled."""
        return self._flights[0] if self._flights else None

    def compute(self, flight: Flight) -> Drawn | None:
        """The tokens of the oldest step that is not settled; None when memory ran out.

        In any one thread. Meanwhile other threads may call everything but `settle`.
        """
        pending = self.launch(flight)
        return None if pending is None else self.wait(pending)

    @torch.inference_mode()
    def launch(self, flight: Flight) -> Pending | None:
        """Starts a step, in the order in which they were begun; None when memory ran out.

        With `ahead`, before the step before was waited for, if this one does not look back.
        """
        try:
            return self._runner.launch(flight.flat, flight.histories)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            print(f"a step of {flight.plan.tokens} tokens ran out of memory: {error}", file=sys.stderr)
            return None

    def wait(self, pending: Pending) -> Drawn:
        """The tokens of a step that was launched, once they are there."""
        return pending.wait()

    def settle(self, drawn: Drawn | None) -> Landing:
        """Books what `compute` gave for the oldest step."""
        if drawn is None:
            return self._retreat()
        flight = self._flights.popleft()
        ended_ns = self._clock_ns()
        advances = self._scheduler.settle(flight.plan, drawn.tokens, ended_ns)
        for advance in advances:
            if advance.finish is not None:
                del self._histories[advance.sequence.id]
        step_ns = ended_ns - max(flight.began_ns, self._ended_ns)
        self._ended_ns = ended_ns
        self._scheduler.took(flight.plan, step_ns)
        self._rates.note(flight.plan.tokens - flight.plan.decodes, flight.plan.decodes, step_ns)
        return Landing(advances, drawn, [], ended_ns, step_ns, flight.plan.tokens)

    def tell(self, landing: Landing) -> Step:
        """The outputs of a settled step."""
        logprobs, now_ns = landing.drawn.logprobs, landing.ended_ns
        outputs = [output_of(advance, logprobs[advance.row], now_ns) for advance in landing.advances]
        return self.now(outputs + landing.lost, landing.step_ns, landing.tokens)

    def now(self, outputs: list[Output], step_ns: int = 0, step_tokens: int = 0) -> Step:
        """Outputs, the present load and the prefix cache's news since the last `Step`: each must be sent."""
        return step_of(self._scheduler, self._rates, outputs, step_ns, step_tokens)

    def _retreat(self) -> Landing:
        """Memory ran out: nothing of the steps on their way is booked."""
        plan = self._flights[0].plan
        self._flights.clear()
        self._runner.forget()
        free_caches(self._loaded.device)
        lost = self._scheduler.out_of_memory(plan)
        outputs = []
        if lost is not None:
            del self._histories[lost.id]
            outputs = [Output(lost.id, [], lost.output_tokens, finish="error", error=GIVEN_UP)]
        return Landing([], Drawn([], []), outputs, self._clock_ns(), 0, 0)

    def load(self) -> Load:
        """What the engine can take."""
        return load_of(self._scheduler.room(), self._rates)

    def warm_up(self) -> None:
        """After the first steps, and before anybody else's."""
        self._runner.warm_up()

    def forget_rates(self) -> None:
        """Measured speeds begin anew."""
        self._rates = Rates()

    @staticmethod
    def _named_ids(command: Submit) -> list[int]:
        return [*command.prompt, *command.output, *command.stop_token_ids, *command.sampling.logit_bias]


REFUSALS = {
    Verdict.EMPTY: "the prompt is empty",
    Verdict.TOO_LONG: "prompt and output fill the context",
    Verdict.DUPLICATE: "a sequence of this id is running",
    Verdict.FULL: "too many sequences are waiting",
}
