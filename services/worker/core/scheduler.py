"""Which tokens the next step computes: decodes first, then chunks of prompts, then new arrivals.

`plan()` reserves the blocks of a step, `settle()` takes the tokens that it drew; between the two the
caller computes. A plan that is never settled costs nothing but its reservations.

Nothing deadlocks: the sequence of the first rank always goes on, because all others can be pre-empted
for it, and none is accepted that would not fit alone. A pre-empted sequence loses its blocks, keeps its
tokens and its rank, and is computed again; it returns only when there is a spare block for every
sequence that runs, so that it is not thrown out again at once.

Bounds: `sequences_max` running, `waiting_max` waiting, `step_tokens_max` tokens a step.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from services.worker.core.blocks import BlockPool, blocks_for
from services.worker.core.sequence import Event, Finish, Sequence, State


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold."""

    total_blocks: int
    block_tokens: int
    sequences_max: int
    step_tokens_max: int
    context_length: int
    """Prompt and output together, in tokens; at most what all blocks hold."""
    waiting_max: int = 4096

    def __post_init__(self) -> None:
        if self.step_tokens_max < self.sequences_max:
            raise ValueError("step_tokens_max must be at least sequences_max")
        if self.context_length > self.total_blocks * self.block_tokens:
            raise ValueError("context_length must fit into total_blocks")


class Verdict(enum.Enum):
    """The answer to an arrival."""

    ACCEPTED = "accepted"
    EMPTY = "empty"
    """There is no token to continue."""
    TOO_LONG = "too_long"
    """Prompt and output leave no room for one more token."""
    COMPLETE = "complete"
    """The output that came along is already `max_new_tokens` long, or fills the context."""
    DUPLICATE = "duplicate"
    """A sequence of this id is here already."""
    FULL = "full"
    """`waiting_max` sequences are waiting."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether the step draws the sequence's next token: its last known one is among these."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. The first `decodes` chunks are single tokens."""

    chunks: list[Chunk]
    decodes: int
    tokens: int

    def __bool__(self) -> bool:
        return bool(self.chunks)


@dataclass(frozen=True, slots=True)
class Advance:
    """One token that a step gave one sequence."""

    sequence: Sequence
    token: int
    index: int
    """Its position in the output."""
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Room:
    """What the next arrival may use."""

    running: int
    waiting: int
    free_sequences: int
    free_blocks: int
    queued_prefill_tokens: int


class Scheduler:
    """All sequences of one engine. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._pool = BlockPool(limits.total_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence, now_ns: int) -> Verdict:
        """Queues a sequence unless the verdict says why not."""
        verdict = self._judge(sequence)
        if verdict is Verdict.ACCEPTED:
            self._arrivals += 1
            sequence.arrival = self._arrivals
            sequence.arrived_ns = now_ns
            self._sequences[sequence.id] = sequence
            bisect.insort(self._waiting, sequence, key=_rank)
        return verdict

    def cancel(self, sequence_id: str) -> Sequence | None:
        """Forgets a sequence and frees its blocks; None when it is not here (any more)."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._leave(sequence, Event.CANCEL)
        return sequence

    def plan(self, now_ns: int) -> Plan:
        """The next step; empty only when no sequence is here."""
        chunks, preempted = self._decodes()
        decodes = len(chunks)
        budget = self.limits.step_tokens_max - decodes
        for sequence in self._running:
            if budget and sequence.pending > 1:
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].count
        while budget and not preempted and (admitted := self._admit(now_ns)) is not None:
            chunks.append(_chunk(admitted, budget))
            budget -= chunks[-1].count
        return Plan(chunks, decodes, self.limits.step_tokens_max - budget)

    def settle(self, plan: Plan, tokens: Seq[int], now_ns: int) -> list[Advance]:
        """Books a computed plan. `tokens` are the drawn ones, in the order of the chunks that draw.

        Sequences cancelled since `plan()` are passed over.
        """
        drawing = [chunk for chunk in plan.chunks if chunk.draws]
        if len(drawing) != len(tokens):
            raise ValueError(f"{len(drawing)} tokens were to be drawn, {len(tokens)} came")
        for number, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            if sequence.state is State.RUNNING:
                sequence.computed = chunk.start + chunk.count
                sequence.steps += 1
                sequence.prefilled += chunk.count if number >= plan.decodes else 0
        return [
            self._advance(chunk.sequence, token, now_ns)
            for chunk, token in zip(drawing, tokens, strict=True)
            if chunk.sequence.state is State.RUNNING
        ]

    def room(self) -> Room:
        """What is free, after what the waiting ones will take."""
        running, waiting = len(self._running), len(self._waiting)
        promised = sum(self._blocks_wanted(sequence) + 1 for sequence in self._waiting)
        prefilling = sum(sequence.pending for sequence in self._running if sequence.pending > 1)
        return Room(
            running=running,
            waiting=waiting,
            free_sequences=max(0, self.limits.sequences_max - running - waiting),
            free_blocks=max(0, self._pool.free - promised),
            queued_prefill_tokens=prefilling + sum(sequence.pending for sequence in self._waiting),
        )

    def _judge(self, sequence: Sequence) -> Verdict:
        length, context = len(sequence.tokens), self.limits.context_length
        if not sequence.tokens:
            return Verdict.EMPTY
        if sequence.prompt_tokens >= context or length > context:
            return Verdict.TOO_LONG
        if sequence.output_tokens >= sequence.max_new_tokens or length == context:
            return Verdict.COMPLETE
        if sequence.id in self._sequences:
            return Verdict.DUPLICATE
        if len(self._waiting) >= self.limits.waiting_max:
            return Verdict.FULL
        return Verdict.ACCEPTED

    def _decodes(self) -> tuple[list[Chunk], bool]:
        """One chunk for each sequence that decodes, oldest first, and whether any was pre-empted."""
        chunks: list[Chunk] = []
        before = len(self._running)
        for sequence in list(self._running):
            if sequence.state is State.RUNNING and sequence.pending == 1 and self._extend(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return chunks, len(self._running) < before

    def _extend(self, sequence: Sequence) -> bool:
        """Makes room for one more token, at the cost of the newest; False when that is itself."""
        if self._blocks_wanted(sequence) <= len(sequence.blocks):
            return True
        while not self._pool.free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.take(1)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._leave(victim, Event.PREEMPT)
        victim.computed = 0
        victim.preemptions += 1
        bisect.insort(self._waiting, victim, key=_rank)

    def _admit(self, now_ns: int) -> Sequence | None:
        """The first waiting sequence, with blocks for all it has, if they and a spare one are free."""
        if not self._waiting or len(self._running) >= self.limits.sequences_max:
            return None
        sequence = self._waiting[0]
        wanted = self._blocks_wanted(sequence)
        spare = len(self._running) if sequence.preemptions else min(1, len(self._running))
        if wanted + spare > self._pool.free:
            return None
        del self._waiting[0]
        sequence.apply(Event.ADMIT)
        sequence.blocks = self._pool.take(wanted)
        sequence.started_ns = sequence.started_ns or now_ns
        bisect.insort(self._running, sequence, key=_rank)
        return sequence

    def _advance(self, sequence: Sequence, token: int, now_ns: int) -> Advance:
        index = sequence.output_tokens
        sequence.tokens.append(token)
        sequence.first_token_ns = sequence.first_token_ns or now_ns
        finish = sequence.finish_after(token, self.limits.context_length)
        if finish is not None:
            del self._sequences[sequence.id]
            self._leave(sequence, Event.FINISH)
        return Advance(sequence, token, index, finish)

    def _leave(self, sequence: Sequence, event: Event) -> None:
        (self._running if sequence.state is State.RUNNING else self._waiting).remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.apply(event)

    def _blocks_wanted(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.tokens), self.limits.block_tokens)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, sequence.computed, min(sequence.pending, budget))
