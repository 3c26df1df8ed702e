"""One generation as its caller asked for it, whatever door it came through.

Values only: bounds are `validation`'s, defaults are filled in by `plan`. `None` means that the
caller left a field out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """How urgent a request is; numbers as in `loom.inference.v1.Priority`."""

    INTERACTIVE = 1
    STANDARD = 2
    BATCH = 3
    SHEDDABLE = 4


class Finish(IntEnum):
    """Why a generation ended; numbers as in `loom.inference.v1.FinishReason`."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    BUDGET = 4


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's own template."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stops:
    """When the generation ends."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What comes back beside the text."""

    logprobs: bool = False
    top_logprobs: int = 0
    token_ids: bool = False
    keep_special_tokens: bool = False
    choice_count: int = 1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Everything that the caller said. `prompt` is None when it said nothing to continue."""

    model: str
    prompt: Prompt | None
    sampling: Sampling = Sampling()
    stops: Stops = Stops()
    output: Output = Output()
    priority: Priority = Priority.STANDARD
    session_key: str = ""
    cache_salt: str = ""
    queue_timeout_s: float | None = None
