"""The words of the scheduler: what an engine can hold, what a step computes, what comes of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.worker.core.sequence import Finish, Sequence


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
    feeds_from: int = -1
    """Its token is the one that the plan before draws: this entry of that plan's drawn tokens. -1: known."""

    @property
    def draws(self) -> bool:
        """Whether the step draws the sequence's next token: its last one is among these.

        The same from `plan()` to `settle()`, whatever becomes known in between.
        """
        return self.start + self.count >= len(self.sequence.tokens)


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
    row: int
    """Which of the step's drawn tokens it is."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the next arrival may use."""

    running: int
    waiting: int
    free_sequences: int
    free_blocks: int
    queued_prefill_tokens: int
    cached_blocks: int
    """Blocks that can be found by their content, held or free."""
