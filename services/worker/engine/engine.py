"""The engine without its process: sequences in, one `Step` of outputs for each step out.

A step is plan, run, sample, settle. No sockets here, and the clock is an argument, so that tests and
benchmarks drive it in their own process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from services.worker.core.scheduler import Advance, Limits, Plan, Scheduler, Verdict
from services.worker.core.sequence import Finish, Sequence
from services.worker.engine.config import EngineConfig
from services.worker.engine.history import History
from services.worker.engine.loader import LoadedModel
from services.worker.engine.rates import Rates
from services.worker.engine.runner import Runner
from services.worker.engine.sampling import Batch, Drawn, sample
from services.worker.protocol import Load, Output, Ready, Step, Submit, TokenLogprobs

Clock = Callable[[], int]
"""Nanoseconds of a monotonic clock."""


class Engine:
    """One model's sequences. Not thread-safe."""

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
        self._runner = Runner(loaded, self.limits)
        self._scheduler = Scheduler(self.limits)
        self._histories: dict[str, History] = {}
        self._batch = Batch([], loaded.device)
        self._rates = Rates()

    @property
    def idle(self) -> bool:
        """Whether there is no sequence here."""
        return not len(self._scheduler)

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
        )

    def submit(self, command: Submit) -> Output | None:
        """Queues a sequence; an Output that ends it at once when it cannot run."""
        tokens = command.prompt + command.output
        sequence = Sequence(
            id=command.id,
            tokens=tokens,
            prompt_tokens=len(command.prompt),
            max_new_tokens=command.max_new_tokens,
            min_new_tokens=command.min_new_tokens,
            stop_token_ids=frozenset(command.stop_token_ids),
            priority=command.priority,
        )
        if not all(0 <= token < self._loaded.shape.vocab_size for token in self._named_ids(command)):
            return _refusal(command, "a token id is outside the vocabulary")
        verdict = self._scheduler.add(sequence, self._clock_ns())
        if verdict is Verdict.COMPLETE:
            return Output(id=command.id, tokens=[], index=len(command.output), finish=Finish.LENGTH.value)
        if verdict is not Verdict.ACCEPTED:
            return _refusal(command, REFUSALS[verdict])
        self._histories[command.id] = History.of(sequence, command.sampling)
        return None

    def cancel(self, sequence_id: str) -> None:
        """Forgets a sequence; its blocks are free at once."""
        if self._scheduler.cancel(sequence_id) is not None:
            del self._histories[sequence_id]

    def step(self) -> Step:
        """Computes one step; without outputs when there was nothing to do."""
        began_ns = self._clock_ns()
        plan = self._scheduler.plan(began_ns)
        drawn = self._compute(plan) if plan else Drawn([], [])
        ended_ns = self._clock_ns()
        advances = self._scheduler.settle(plan, drawn.tokens, ended_ns)
        self._rates.note(plan.tokens - plan.decodes, plan.decodes, ended_ns - began_ns)
        outputs = [
            self._output(advance, logprobs, ended_ns)
            for advance, logprobs in zip(advances, drawn.logprobs, strict=True)
        ]
        return Step(outputs, self.load(), ended_ns - began_ns, plan.tokens)

    def load(self) -> Load:
        """What the engine can take."""
        room = self._scheduler.room()
        return Load(
            running=room.running,
            waiting=room.waiting,
            free_sequences=room.free_sequences,
            free_blocks=room.free_blocks,
            queued_prefill_tokens=room.queued_prefill_tokens,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_tokens_per_s=self._rates.decode_tokens_per_s,
        )

    def forget_rates(self) -> None:
        """Measured speeds begin anew."""
        self._rates = Rates()

    @torch.inference_mode()
    def _compute(self, plan: Plan) -> Drawn:
        logits, sequences = self._runner.run(plan)
        if logits is None:
            return Drawn([], [])
        if not self._batch.is_for(sequences):
            histories = [self._histories[sequence.id] for sequence in sequences]
            self._batch = Batch(histories, self._loaded.device)
        return sample(logits, self._batch)

    def _output(self, advance: Advance, logprobs: TokenLogprobs | None, now_ns: int) -> Output:
        sequence = advance.sequence
        begun = sequence.first_token_ns == now_ns
        if advance.finish is None and not begun:
            return Output(sequence.id, [advance.token], advance.index, [logprobs] if logprobs else [])
        if advance.finish is not None:
            del self._histories[sequence.id]
        return Output(
            id=sequence.id,
            tokens=[advance.token],
            index=advance.index,
            logprobs=[logprobs] if logprobs else [],
            finish=advance.finish.value if advance.finish else "",
            stop_token_id=advance.token if advance.finish is Finish.STOP else -1,
            computed_prompt_tokens=sequence.prefilled,
            waiting_ns=sequence.started_ns - sequence.arrived_ns,
            prefill_ns=sequence.first_token_ns - sequence.started_ns,
            decode_ns=now_ns - sequence.first_token_ns,
            steps=sequence.steps,
            preemptions=sequence.preemptions,
        )

    @staticmethod
    def _named_ids(command: Submit) -> list[int]:
        return [*command.prompt, *command.output, *command.stop_token_ids, *command.sampling.logit_bias]


REFUSALS = {
    Verdict.EMPTY: "the prompt is empty",
    Verdict.TOO_LONG: "prompt and output fill the context",
    Verdict.DUPLICATE: "a sequence of this id is running",
    Verdict.FULL: "too many sequences are waiting",
}


def _refusal(command: Submit, why: str) -> Output:
    return Output(id=command.id, tokens=[], index=len(command.output), finish="error", error=why)
