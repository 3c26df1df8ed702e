"""Which steps are measured for the law of a step's time, and which of them an engine can hold.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Limits

WARM_UPS = 4
"""Steps of each point that are not counted: a new shape's buffers, and the pipeline fills."""
AT_ONCE = 3
"""Prompts that hold blocks at the same time: one computes, one is planned, one is settled."""


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step. `chunk` 0: no prompt; `decodes` 0: nothing else."""

    decodes: int = 0
    context: int = 0
    """Tokens that each decode attends to, in the middle of the steps that are counted."""
    chunk: int = 0
    before: int = 0
    """Tokens of the chunk's prompt that are computed already."""

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk

    @property
    def kind(self) -> str:
        return "mixed" if self.decodes and self.chunk else "prefill" if self.chunk else "decode"

    def length_max(self, steps: int) -> int:
        """The longest of its sequences, the drawn tokens included."""
        return max(self.context + steps + WARM_UPS if self.decodes else 0, self.before + self.chunk + 1)

    def fits(self, limits: Limits, steps: int) -> bool:
        """Whether the engine can hold it, without pre-empting anything."""
        each = blocks_for(self.context + steps + WARM_UPS, limits.block_tokens) + 1
        prompt = blocks_for(self.before + self.chunk + 1, limits.block_tokens) + 1
        prompts = AT_ONCE if self.chunk else 0
        return (
            self.length_max(steps) < limits.context_length
            and self.tokens <= limits.step_tokens_max
            and self.decodes + prompts <= limits.sequences_max
            and self.decodes * each + prompts * prompt <= limits.total_blocks
        )


@dataclass(frozen=True, slots=True)
class Grid:
    """Decodes alone, chunks of prompts alone, and both in one step."""

    batches: Sequence[int] = (1, 8, 32, 64, 128, 256)
    contexts: Sequence[int] = (256, 2048, 8192, 16384)
    chunks: Sequence[int] = (256, 512, 1024, 2048, 4096)
    before: Sequence[int] = (0, 4096, 16384)
    mixed: Point = field(default_factory=lambda: Point(decodes=16, context=8192))
    mixed_chunks: Sequence[int] = (512, 2048)

    def points(self) -> list[Point]:
        """Each combination once."""
        mixed = self.mixed
        return [
            *(Point(decodes=batch, context=context) for batch in self.batches for context in self.contexts),
            *(Point(chunk=chunk, before=before) for before in self.before for chunk in self.chunks),
            *(Point(mixed.decodes, mixed.context, chunk, 0) for chunk in self.mixed_chunks),
        ]
