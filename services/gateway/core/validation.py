"""Bounds on a request. Every problem of one request is found in one go.

Fields are named as in `loom.inference.v1.GenerateRequest`; a door that names them otherwise renames
the violations. Knows nothing of where the request came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from services.gateway.core.refusal import Refusal, Violation
from services.gateway.core.request import (
    ChatPrompt,
    GenerationRequest,
    Output,
    Prompt,
    Sampling,
    Stops,
    TextPrompt,
    TokenPrompt,
)

SEED_MAX = 2**64 - 1
TOKENS_MAX = 2**31 - 1
LOGIT_BIAS_MAX = 300
STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 256
STOP_TOKEN_IDS_MAX = 64
TOP_LOGPROBS_MAX = 20
CHOICES_MAX = 16
MESSAGES_MAX = 4096
NAME_CHARS_MAX = 64
SESSION_KEY_CHARS_MAX = 128
CACHE_SALT_CHARS_MAX = 64
QUEUE_TIMEOUT_S_MAX = 86_400.0
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The facts of a model that bound a request."""

    context_length: int
    vocab_size: int


def violations(request: GenerationRequest, limits: ModelLimits | None) -> list[Violation]:
    """Every field outside its bounds; `limits` is None while the model is not known."""
    found = [*prompt_violations(request.prompt, limits)]
    found += _sampling(request.sampling, limits)
    found += _stops(request.stops, limits)
    found += _output(request.output)
    if len(request.session_key) > SESSION_KEY_CHARS_MAX:
        found.append(_too_long("session_key", SESSION_KEY_CHARS_MAX, len(request.session_key)))
    if len(request.cache_salt) > CACHE_SALT_CHARS_MAX:
        found.append(_too_long("cache_salt", CACHE_SALT_CHARS_MAX, len(request.cache_salt)))
    timeout = request.queue_timeout_s
    if timeout is not None and not 0 <= timeout <= QUEUE_TIMEOUT_S_MAX:
        found.append(
            Violation("queue_timeout", f"must be from 0 to {QUEUE_TIMEOUT_S_MAX:.0f} s, not {timeout:g}")
        )
    return found


def check_prompt_bytes(
    prompt: Prompt, bytes_max: int, name_of: Callable[[str], str] = lambda field: field
) -> None:
    """Raises Refusal when the prompt's text is longer than `bytes_max` in UTF-8.

    `name_of` turns the field's name into the door's.
    """
    match prompt:
        case TextPrompt(text):
            field, size = "prompt", len(text.encode())
        case ChatPrompt(messages):
            field, size = "chat.messages", sum(len(message.content.encode()) for message in messages)
        case TokenPrompt():
            return
    if size > bytes_max:
        field = name_of(field)
        raise Refusal(
            "REQUEST_TOO_LARGE",
            f"{field}: {size} bytes of text; at most {bytes_max} are taken",
            metadata={"field": field, "size": str(size), "limit": str(bytes_max)},
        )


def prompt_violations(prompt: Prompt | None, limits: ModelLimits | None) -> Iterator[Violation]:
    """What is wrong with the input alone, for calls that take nothing else."""
    match prompt:
        case None:
            yield Violation("input", "give one of prompt, prompt_token_ids and chat")
        case TextPrompt(text):
            if not text:
                yield Violation("prompt", "must not be empty")
        case TokenPrompt(ids):
            if not ids:
                yield Violation("prompt_token_ids", "must not be empty")
            elif limits is not None and (worst := max(ids)) >= limits.vocab_size:
                yield Violation("prompt_token_ids", _outside_vocabulary(worst, limits))
        case ChatPrompt(messages):
            yield from _chat(messages)


def _chat(messages: Sequence[object]) -> Iterator[Violation]:
    if not 1 <= len(messages) <= MESSAGES_MAX:
        yield Violation("chat.messages", f"must hold 1 to {MESSAGES_MAX} messages, not {len(messages)}")
        return
    for number, message in enumerate(messages):
        role, name = getattr(message, "role", ""), getattr(message, "name", None)
        if role not in ROLES:
            yield Violation(
                f"chat.messages[{number}].role", f"must be one of {', '.join(ROLES)}, not {role[:32]!r}"
            )
        if name is not None and len(name) > NAME_CHARS_MAX:
            yield _too_long(f"chat.messages[{number}].name", NAME_CHARS_MAX, len(name))


def _sampling(s: Sampling, limits: ModelLimits | None) -> Iterator[Violation]:
    yield from _within("sampling.temperature", s.temperature, 0, 2)
    yield from _within("sampling.top_p", s.top_p, 0, 1, above=True)
    yield from _within("sampling.min_p", s.min_p, 0, 1)
    yield from _within("sampling.repetition_penalty", s.repetition_penalty, 0, 10, above=True)
    yield from _within("sampling.presence_penalty", s.presence_penalty, -2, 2)
    yield from _within("sampling.frequency_penalty", s.frequency_penalty, -2, 2)
    yield from _within("sampling.top_k", s.top_k, 0, limits.vocab_size if limits else TOKENS_MAX)
    yield from _within("sampling.seed", s.seed, 0, SEED_MAX)
    if len(s.logit_bias) > LOGIT_BIAS_MAX:
        yield Violation(
            "sampling.logit_bias", f"must hold at most {LOGIT_BIAS_MAX} entries, not {len(s.logit_bias)}"
        )
        return
    for token_id, bias in s.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        yield from _within(field, bias, -100, 100)
        yield from _token_id(field, token_id, limits)


def _stops(s: Stops, limits: ModelLimits | None) -> Iterator[Violation]:
    yield from _within("stop.max_new_tokens", s.max_new_tokens, 1, TOKENS_MAX)
    yield from _within("stop.min_new_tokens", s.min_new_tokens, 0, TOKENS_MAX)
    if s.max_new_tokens is not None and s.min_new_tokens > s.max_new_tokens >= 1:
        yield Violation("stop.min_new_tokens", f"must not be more than max_new_tokens ({s.max_new_tokens})")
    if len(s.strings) > STOP_STRINGS_MAX:
        yield Violation("stop.stop", f"must hold at most {STOP_STRINGS_MAX} strings, not {len(s.strings)}")
    for number, text in enumerate(s.strings[:STOP_STRINGS_MAX]):
        if not 1 <= len(text) <= STOP_CHARS_MAX:
            yield Violation(
                f"stop.stop[{number}]", f"must have 1 to {STOP_CHARS_MAX} characters, not {len(text)}"
            )
    if len(s.token_ids) > STOP_TOKEN_IDS_MAX:
        yield Violation(
            "stop.stop_token_ids", f"must hold at most {STOP_TOKEN_IDS_MAX} ids, not {len(s.token_ids)}"
        )
    for number, token_id in enumerate(s.token_ids[:STOP_TOKEN_IDS_MAX]):
        yield from _token_id(f"stop.stop_token_ids[{number}]", token_id, limits)


def _output(o: Output) -> Iterator[Violation]:
    yield from _within("output.top_logprobs", o.top_logprobs, 0, TOP_LOGPROBS_MAX)
    if o.top_logprobs and not o.logprobs:
        yield Violation("output.top_logprobs", "needs logprobs to be true")
    yield from _within("output.choice_count", o.choice_count, 1, CHOICES_MAX)


def _within(
    field: str, value: float | None, low: float, high: float, *, above: bool = False
) -> Iterator[Violation]:
    """`low` itself is outside when `above` is set. NaN is outside every bound."""
    if value is None or (low < value <= high if above else low <= value <= high):
        return
    shown = f"{value}" if isinstance(value, int) or not isfinite(value) else f"{value:g}"
    span = f"more than {low} and at most {high}" if above else f"from {low} to {high}"
    yield Violation(field, f"must be {span}, not {shown}")


def _token_id(field: str, token_id: int, limits: ModelLimits | None) -> Iterator[Violation]:
    if token_id < 0:
        yield Violation(field, f"{token_id} is no token id")
    elif limits is not None and token_id >= limits.vocab_size:
        yield Violation(field, _outside_vocabulary(token_id, limits))


def _outside_vocabulary(token_id: int, limits: ModelLimits) -> str:
    return f"{token_id} is outside this model's vocabulary of {limits.vocab_size} tokens"


def _too_long(field: str, chars_max: int, chars: int) -> Violation:
    return Violation(field, f"must have at most {chars_max} characters, not {chars}")
