"""How many prompt tokens share a step with decodes, so that those wait no longer than a bound.

A step's time grows with its tokens. Each step that was as large as allowed and still served decodes
corrects the allowance: by the bound over what it took, at most GAIN_MAX times more at once. Pure: times
come in as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TOKENS_FLOOR = 16
"""Prompts go on, however long a step takes."""
GAIN_MAX = 1.5
LARGE = 0.75
"""Of the allowance; smaller steps tell nothing about it."""


@dataclass(slots=True)
class Chunking:
    """The allowance, from TOKENS_FLOOR to `tokens_max`. `bound_ns` 0: no bound."""

    tokens_max: int
    bound_ns: int = 0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.tokens_max

    def budget(self, left: int, decodes: int) -> int:
        """Prompt tokens for a step with so many decodes, of the `left` that fit into it."""
        return min(left, self.tokens) if decodes and self.bound_ns else left

    def note(self, prompt_tokens: int, decodes: int, step_ns: int) -> None:
        """A step took so long."""
        if not self.bound_ns or not decodes or step_ns <= 0 or prompt_tokens < LARGE * self.tokens:
            return
        wanted = prompt_tokens * min(GAIN_MAX, self.bound_ns / step_ns)
        self.tokens = max(min(TOKENS_FLOOR, self.tokens_max), min(self.tokens_max, int(wanted)))
