"""The sim engine's state: the real scheduler, with pretended results. No clock, no sockets."""

from __future__ import annotations

from services.worker.core.plan import Advance, Limits, Plan, Verdict
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Sequence
from services.worker.engine.rates import Rates
from services.worker.protocol import Load, Output, Ready, Step, Submit
from services.worker.sim.config import SimConfig
from services.worker.sim.law import logprobs_at, step_s, token_at
from services.worker.stepping import load_of, output_of, refusal, sequence_of, step_of


class SimEngine:
    """Sequences in, outputs out, step by step: `plan`, let `duration_s` pass, `settle`."""

    def __init__(self, config: SimConfig) -> None:
        self._config = config
        self._context_length = min(config.context_length, config.total_blocks * config.block_tokens)
        self._scheduler = Scheduler(
            Limits(
                total_blocks=config.total_blocks,
                block_tokens=config.block_tokens,
                sequences_max=config.sequences_max,
                step_tokens_max=config.step_tokens_max,
                context_length=self._context_length,
            ),
            prefix_cache=config.prefix_cache,
        )
        self._submits: dict[str, Submit] = {}
        self._rates = Rates()

    def ready(self) -> Ready:
        """What it says of itself once it is loaded."""
        config = self._config
        return Ready(
            context_length=self._context_length,
            vocab_size=config.vocab_size,
            sequences_max=config.sequences_max,
            total_blocks=config.total_blocks,
            block_tokens=config.block_tokens,
            memory_bytes=0,
            device="sim",
            dtype="none",
            step_tokens_max=config.step_tokens_max,
        )

    def submit(self, command: Submit, now_ns: int) -> Output | None:
        """Queue a sequence; an output with finish `error` when it can never run."""
        verdict = self._scheduler.add(sequence_of(command), now_ns)
        if verdict is not Verdict.ACCEPTED:
            return refusal(command, verdict.value)
        self._submits[command.id] = command
        return None

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence; its blocks are free at once."""
        if self._scheduler.cancel(sequence_id) is not None:
            del self._submits[sequence_id]

    def plan(self, now_ns: int) -> Plan:
        """The next step; empty when there is nothing to do."""
        return self._scheduler.plan(now_ns)

    def duration_s(self, plan: Plan) -> float:
        """How long that step takes."""
        return step_s(self._config, len(plan.chunks), plan.tokens - plan.decodes)

    def settle(self, plan: Plan, now_ns: int) -> list[Output]:
        """The step is over: what it gave each sequence that is still there."""
        drawn = [self._draw(chunk.sequence) for chunk in plan.chunks if chunk.draws]
        advances = self._scheduler.settle(plan, drawn, now_ns)
        prefilled = plan.tokens - plan.decodes
        self._rates.note(prefilled, plan.decodes, int(self.duration_s(plan) * 1e9))
        return [self._output(advance, now_ns) for advance in advances]

    def tell(self, outputs: list[Output], step_ns: int = 0, step_tokens: int = 0) -> Step:
        """The message that says so; each must be sent."""
        return step_of(self._scheduler, self._rates, outputs, step_ns, step_tokens)

    def load(self) -> Load:
        """What it can take."""
        return load_of(self._scheduler.room(), self._rates)

    def _draw(self, sequence: Sequence) -> int:
        command = self._submits.get(sequence.id)
        if command is None:
            # Cancelled since the plan: whatever is drawn is passed over.
            return 0
        return token_at(command.sampling.seed, len(sequence.tokens), self._config.vocab_size)

    def _output(self, advance: Advance, now_ns: int) -> Output:
        sequence, token = advance.sequence, advance.token
        sampling = self._submits[sequence.id].sampling
        logprobs = None
        if sampling.logprobs >= 0:
            position, vocab_size = len(sequence.tokens) - 1, self._config.vocab_size
            logprobs = logprobs_at(sampling.seed, position, token, sampling.logprobs, vocab_size)
        if advance.finish is not None:
            del self._submits[sequence.id]
        return output_of(advance, logprobs, now_ns)
