"""From a valid request to what a worker is told: every default filled in, the context respected.

Decides defaults and the token budget. Must not know where randomness comes from: the seed for
callers who gave none is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.gateway.core.refusal import Refusal
from services.gateway.core.request import GenerationRequest, Sampling

SEED_SPACE = 2**64


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's generation_config.json states; the rest keeps the value that switches it off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class FilledSampling:
    """Sampling parameters without gaps."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every choice of one request shares."""

    prompt_ids: tuple[int, ...]
    sampling: FilledSampling
    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: tuple[int, ...]
    """The model's own end tokens, unless they are to be ignored, then the caller's."""

    def seed_of(self, choice: int) -> int:
        """Choices of one request draw different numbers, the same ones each time."""
        return (self.sampling.seed + choice) % SEED_SPACE


def defaults_from(generation_config: Mapping[str, object]) -> SamplingDefaults:
    """The defaults that a model states, as vLLM reads them; values of the wrong type are passed over."""

    def number(key: str, otherwise: float) -> float:
        value = generation_config.get(key)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        return float(value) if usable else otherwise  # type: ignore[arg-type]

    return SamplingDefaults(
        temperature=min(2.0, number("temperature", 1.0)),
        top_p=min(1.0, number("top_p", 1.0)) or 1.0,
        top_k=int(number("top_k", 0)),
        min_p=min(1.0, number("min_p", 0.0)),
        repetition_penalty=min(10.0, number("repetition_penalty", 1.0)) or 1.0,
    )


def make_plan(
    request: GenerationRequest,
    prompt_ids: tuple[int, ...],
    *,
    context_length: int,
    model_stop_ids: tuple[int, ...],
    defaults: SamplingDefaults,
    seed: int,
) -> Plan:
    """Fill in what the caller left out. `seed` is used when it gave none, in [0, 2**64).

    Raises Refusal (CONTEXT_LENGTH_EXCEEDED) when prompt and output do not fit.
    """
    room = context_length - len(prompt_ids)
    wanted = request.stops.max_new_tokens
    least = max(1, request.stops.min_new_tokens)
    if room < (least if wanted is None else wanted):
        raise _too_long(len(prompt_ids), wanted, least, context_length)
    own_stops = () if request.stops.ignore_eos else model_stop_ids
    return Plan(
        prompt_ids=prompt_ids,
        sampling=_fill(request.sampling, defaults, seed),
        max_new_tokens=room if wanted is None else wanted,
        min_new_tokens=request.stops.min_new_tokens,
        stop_token_ids=tuple(dict.fromkeys((*own_stops, *request.stops.token_ids))),
    )


def _fill(s: Sampling, defaults: SamplingDefaults, seed: int) -> FilledSampling:
    return FilledSampling(
        temperature=_first(s.temperature, defaults.temperature),
        top_p=_first(s.top_p, defaults.top_p),
        top_k=defaults.top_k if s.top_k is None else s.top_k,
        min_p=_first(s.min_p, defaults.min_p),
        repetition_penalty=_first(s.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_first(s.presence_penalty, 0.0),
        frequency_penalty=_first(s.frequency_penalty, 0.0),
        seed=seed if s.seed is None else s.seed,
        logit_bias=s.logit_bias,
    )


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _too_long(prompt_tokens: int, wanted: int | None, least: int, context_length: int) -> Refusal:
    output = f"{least} of output at least" if wanted is None else f"{wanted} of output (max_new_tokens)"
    cure = "shorten the prompt" if prompt_tokens >= context_length else "shorten the prompt or ask for less"
    return Refusal(
        "CONTEXT_LENGTH_EXCEEDED",
        f"{prompt_tokens} prompt tokens and {output} do not fit in this model's context of "
        f"{context_length} tokens: {cure}",
        metadata={
            "prompt_tokens": str(prompt_tokens),
            "max_new_tokens": str(least if wanted is None else wanted),
            "context_length": str(context_length),
        },
    )


def far_too_long(chars: int, context_length: int) -> Refusal:
    """A prompt that fills the context several times over; its tokens were not all counted."""
    return Refusal(
        "CONTEXT_LENGTH_EXCEEDED",
        f"a prompt of {chars} characters has more tokens than this model's context of {context_length}: "
        "shorten the prompt",
        metadata={
            "prompt_tokens": f"more than {context_length}",
            "max_new_tokens": "1",
            "context_length": str(context_length),
        },
    )
