"""What every kind of engine says in the words of the step protocol: sequences, outputs, steps, load."""

from __future__ import annotations

from services.worker.core.plan import Advance, Room
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Finish, Sequence
from services.worker.engine.rates import Rates
from services.worker.protocol import Load, Output, Step, Submit, TokenLogprobs
from tokenloom.contract.prefix import numbers


def sequence_of(command: Submit) -> Sequence:
    """What the scheduler is given."""
    return Sequence(
        id=command.id,
        tokens=command.prompt + command.output,
        prompt_tokens=len(command.prompt),
        max_new_tokens=command.max_new_tokens,
        min_new_tokens=command.min_new_tokens,
        stop_token_ids=frozenset(command.stop_token_ids),
        priority=command.priority,
        prefix_root=command.prefix_root,
    )


def output_of(advance: Advance, logprobs: TokenLogprobs | None, now_ns: int) -> Output:
    """One token. The first and the last also say what the sequence took so far."""
    sequence, found = advance.sequence, [logprobs] if logprobs is not None else []
    if advance.finish is None and sequence.first_token_ns != now_ns:
        return Output(sequence.id, [advance.token], advance.index, found)
    return Output(
        id=sequence.id,
        tokens=[advance.token],
        index=advance.index,
        logprobs=found,
        finish=advance.finish.value if advance.finish else "",
        stop_token_id=advance.token if advance.finish is Finish.STOP else -1,
        cached_prompt_tokens=sequence.cached,
        computed_prompt_tokens=sequence.prefilled,
        waiting_ns=sequence.started_ns - sequence.arrived_ns,
        prefill_ns=sequence.first_token_ns - sequence.started_ns,
        decode_ns=now_ns - sequence.first_token_ns,
        steps=sequence.steps,
        preemptions=sequence.preemptions,
    )


def refusal(command: Submit, why: str) -> Output:
    """The answer to a sequence that cannot run."""
    return Output(id=command.id, tokens=[], index=len(command.output), finish="error", error=why)


def step_of(
    scheduler: Scheduler, rates: Rates, outputs: list[Output], step_ns: int = 0, step_tokens: int = 0
) -> Step:
    """A message to the front: outputs, the present load, and what the prefix cache gained and lost since
    the message before, so that each must be sent.
    """
    load = load_of(scheduler.room(), rates)
    stored, evicted = scheduler.prefix_changes()
    if not stored and not evicted:
        return Step(outputs, load, step_ns, step_tokens)
    return Step(outputs, load, step_ns, step_tokens, [*numbers(stored)], [*numbers(evicted)])


def load_of(room: Room, rates: Rates) -> Load:
    """What the next arrival may use."""
    return Load(
        running=room.running,
        waiting=room.waiting,
        free_sequences=room.free_sequences,
        free_blocks=room.free_blocks,
        queued_prefill_tokens=room.queued_prefill_tokens,
        prefill_tokens_per_s=rates.prefill_tokens_per_s,
        decode_tokens_per_s=rates.decode_tokens_per_s,
        cached_blocks=room.cached_blocks,
    )
