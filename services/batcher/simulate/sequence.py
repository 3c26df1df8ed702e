"""One request on a worker, and what is seen of it from outside."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Happening(Enum):
    """What others may notice."""

    FIRST_TOKEN = "first token"
    ENDED = "ended"


class Seen(NamedTuple):
    """One happening, at the end of the step that brought it."""

    happening: Happening
    sequence: Sequence


class Sequence:
    """A request from landing on a worker to its last token."""

    __slots__ = (
        "cached",
        "computed",
        "generated",
        "held",
        "joined_at_step",
        "number",
        "order",
        "output_tokens",
        "preemptions",
        "prefix",
        "prompt_tokens",
        "started",
        "target",
    )

    def __init__(self, number: int, prompt_tokens: int, output_tokens: int, prefix: tuple[int, ...]) -> None:
        self.number = number
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.prefix = prefix
        self.order = 0
        """Of landing: the oldest goes first."""
        self.target = prompt_tokens
        """Tokens to compute before the next one is drawn: after a pre-emption, those generated too."""
        self.computed = 0
        """Of the target, while it is a prompt."""
        self.generated = 0
        """Tokens drawn, up to when it joined the decodes."""
        self.joined_at_step = -1
        """The worker's count of steps when it joined the decodes; -1: it is a prompt."""
        self.held = 0
        """Pages of its prefix that it uses."""
        self.started = False
        self.cached = 0
        """Prompt tokens found in the cache when it started first."""
        self.preemptions = 0
