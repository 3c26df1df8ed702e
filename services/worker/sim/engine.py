"""The sim engine's state: the real scheduler, with pretended results. No clock, no sockets."""

from __future__ import annotations

from services.worker.core.scheduler import Advance, Limits, Plan, Scheduler, Verdict
from services.worker.core.sequence import Finish, Sequence
from services.worker.protocol import Load, Output, Ready, Submit
from services.worker.sim.config import SimConfig
from services.worker.sim.law import logprobs_at, step_s, token_at

SMOOTHING = 0.1
"""Share of the newest step in the measured speeds."""


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
            )
        )
        self._submits: dict[str, Submit] = {}
        self._prefill_tokens_per_s = 0.0
        self._decode_tokens_per_s = 0.0

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
        )

    def submit(self, command: Submit, now_ns: int) -> Output | None:
        """Queue a sequence; an output with finish `error` when it can never run."""
        sequence = Sequence(
            id=command.id,
            tokens=command.prompt + command.output,
            prompt_tokens=len(command.prompt),
            max_new_tokens=command.max_new_tokens,
            min_new_tokens=command.min_new_tokens,
            stop_token_ids=frozenset(command.stop_token_ids),
            priority=command.priority,
        )
        verdict = self._scheduler.add(sequence, now_ns)
        if verdict is not Verdict.ACCEPTED:
            return Output(command.id, [], len(command.output), finish="error", error=verdict.value)
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
        self._measure(plan)
        return [self._output(advance, now_ns) for advance in advances]

    def load(self) -> Load:
        """What it can take."""
        room = self._scheduler.room()
        return Load(
            running=room.running,
            waiting=room.waiting,
            free_sequences=room.free_sequences,
            free_blocks=room.free_blocks,
            queued_prefill_tokens=room.queued_prefill_tokens,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_tokens_per_s=self._decode_tokens_per_s,
        )

    def _draw(self, sequence: Sequence) -> int:
        command = self._submits.get(sequence.id)
        if command is None:
            # Cancelled since the plan: whatever is drawn is passed over.
            return 0
        return token_at(command.sampling.seed, len(sequence.tokens), self._config.vocab_size)

    def _output(self, advance: Advance, now_ns: int) -> Output:
        sequence, token = advance.sequence, advance.token
        sampling = self._submits[sequence.id].sampling
        logprobs = []
        if sampling.logprobs >= 0:
            position, vocab_size = len(sequence.tokens) - 1, self._config.vocab_size
            logprobs = [logprobs_at(sampling.seed, position, token, sampling.logprobs, vocab_size)]
        if advance.finish is None:
            return Output(sequence.id, [token], advance.index, logprobs)
        del self._submits[sequence.id]
        return Output(
            id=sequence.id,
            tokens=[token],
            index=advance.index,
            logprobs=logprobs,
            finish=advance.finish.value,
            stop_token_id=token if advance.finish is Finish.STOP else -1,
            computed_prompt_tokens=sequence.prefilled,
            waiting_ns=sequence.started_ns - sequence.arrived_ns,
            prefill_ns=sequence.first_token_ns - sequence.started_ns,
            decode_ns=now_ns - sequence.first_token_ns,
            steps=sequence.steps,
            preemptions=sequence.preemptions,
        )

    def _measure(self, plan: Plan) -> None:
        duration_s = self.duration_s(plan)
        if duration_s <= 0:
            return
        prefilled = plan.tokens - plan.decodes
        if prefilled:
            self._prefill_tokens_per_s = _smooth(self._prefill_tokens_per_s, prefilled / duration_s)
        if plan.decodes:
            self._decode_tokens_per_s = _smooth(self._decode_tokens_per_s, plan.decodes / duration_s)


def _smooth(old: float, new: float) -> float:
    return new if not old else old + SMOOTHING * (new - old)
