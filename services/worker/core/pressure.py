"""How much a step may take after one ran out of memory: less at once, more again slowly.

First fewer tokens, down to TOKENS_FLOOR; then fewer sequences; a single sequence at last token by token.
After STEPS_CALM steps without trouble both bounds double, until they are whole again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TOKENS_FLOOR = 16
STEPS_CALM = 64


@dataclass(slots=True)
class Pressure:
    """Bounds of a step, at most `tokens_max` and `sequences_max`."""

    tokens_max: int
    sequences_max: int
    tokens: int = field(init=False)
    sequences: int = field(init=False)
    _calm: int = 0

    def __post_init__(self) -> None:
        self.tokens, self.sequences = self.tokens_max, self.sequences_max

    def rise(self, tokens: int, sequences: int) -> bool:
        """A step of this size ran out of memory. False: nothing smaller is left to try."""
        self._calm = 0
        if tokens > TOKENS_FLOOR:
            self.tokens = max(TOKENS_FLOOR, tokens // 2)
        elif sequences > 1:
            self.tokens, self.sequences = min(self.tokens, TOKENS_FLOOR), sequences // 2
        elif tokens > 1:
            self.tokens = tokens // 2
        else:
            return False
        return True

    def ease(self) -> None:
        """A step went well."""
        if self.tokens == self.tokens_max and self.sequences == self.sequences_max:
            return
        self._calm += 1
        if self._calm == STEPS_CALM:
            self._calm = 0
            self.tokens = min(self.tokens_max, 2 * self.tokens)
            self.sequences = min(self.sequences_max, 2 * self.sequences)
