"""What a generation leaves in its server span and in the metrics, under the field's names (gen_ai.*)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.util.types import AttributeValue

from services.gateway.callers import Caller
from services.gateway.core.request import GenerationRequest

if TYPE_CHECKING:
    from services.gateway.generation import Generation

PROVIDER = "tokenloom"
NAME_CHARS_MAX = 96
"""Longer model strings, which name nothing, are cut in span names."""


class Account:
    """One request's entry in the books; `outcome` is `ok`, `cancelled` or a reason."""

    def __init__(self, caller: Caller, request: GenerationRequest) -> None:
        self.outcome = "INTERNAL"
        self._caller = caller
        self._generation: Generation | None = None
        model = request.model[:NAME_CHARS_MAX]
        caller.span.update_name(f"{caller.operation} {model}" if model else caller.operation)
        caller.span.set_attributes(_asked(caller, request))

    def began(self, generation: Generation) -> None:
        """The request was admitted."""
        self._generation = generation
        if generation.version.deprecation is not None:
            generation.meters.deprecated.inc()
        sampling = generation.plan.sampling
        self._caller.span.set_attributes(
            {
                "gen_ai.request.max_tokens": generation.plan.max_new_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                # Seeds are unsigned 64-bit numbers, attributes are signed ones.
                "gen_ai.request.seed": str(sampling.seed),
                "gen_ai.response.id": self._caller.request_id,
                "gen_ai.response.model": generation.version.full_name,
                "gen_ai.usage.input_tokens": generation.prompt_tokens,
            }
        )

    def settle(self, now_s: float) -> None:
        """The request is over, `now_s` on the monotonic clock."""
        if self.outcome != "ok":
            self._caller.span.set_attribute("error.type", self.outcome)
        if (generation := self._generation) is None:
            return
        self._caller.span.set_attributes(_answered(generation))
        meters = generation.meters
        meters.duration.observe(now_s - self._caller.arrival_s)
        meters.prompt.observe(generation.prompt_tokens)
        meters.generated.observe(generation.completion_tokens)
        meters.cached.inc(generation.cached_prompt_tokens)


def _asked(caller: Caller, request: GenerationRequest) -> dict[str, AttributeValue]:
    return {
        "gen_ai.operation.name": caller.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": request.model[:NAME_CHARS_MAX],
        "gen_ai.request.stream": caller.streams,
        "gen_ai.request.choice.count": request.output.choice_count,
        "gen_ai.request.stop_sequences": request.stops.strings,
        "tokenloom.request_id": caller.request_id,
        "tokenloom.tenant": caller.tenant,
        "tokenloom.priority": request.priority.name.lower(),
    }


def _answered(generation: Generation) -> dict[str, AttributeValue]:
    runners = generation.runners
    attributes: dict[str, AttributeValue] = {
        "gen_ai.usage.output_tokens": generation.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_prompt_tokens,
        "gen_ai.response.finish_reasons": [
            runner.choice.end.reason.name.lower() for runner in runners if runner.choice.end is not None
        ],
        "tokenloom.attempts": sum(runner.choice.journal.attempts for runner in runners),
        "tokenloom.resumes": sum(runner.choice.journal.resumes for runner in runners),
    }
    firsts = [runner.first_token_s for runner in runners if runner.first_token_s is not None]
    if firsts:
        attributes["gen_ai.response.time_to_first_chunk"] = min(firsts)
    return attributes
