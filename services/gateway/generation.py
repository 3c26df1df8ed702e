"""One admitted request while it runs: its outputs, and what they cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from services.gateway import metrics
from services.gateway.callers import Caller
from services.gateway.core.catalogue import ModelVersion
from services.gateway.core.choice import Choice, ChoiceRules, Event
from services.gateway.core.plan import Plan
from services.gateway.core.ports import ModelText, SequenceRequest
from services.gateway.core.request import GenerationRequest
from services.gateway.core.stops import StopScanner
from services.gateway.fanout import merged
from services.gateway.runner import Runner, RunnerTools


class Generation:
    """Runs a request's outputs at the mesh. `events` may be called once."""

    def __init__(
        self,
        *,
        request: GenerationRequest,
        caller: Caller,
        internal_id: str,
        version: ModelVersion,
        text: ModelText,
        plan: Plan,
        prefix: tuple[int, ...],
        tools: RunnerTools,
    ) -> None:
        self.request = request
        self.caller = caller
        self.version = version
        self.text = text
        self.plan = plan
        self.meters = metrics.of_model(version.name)
        self._internal_id = internal_id
        self._prefix = prefix
        self._tools = tools
        self.runners = [self._runner(index) for index in range(request.output.choice_count)]

    @property
    def prompt_tokens(self) -> int:
        return len(self.plan.prompt_ids)

    @property
    def cached_prompt_tokens(self) -> int:
        """Known from the first event on."""
        return self.runners[0].cached_prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Of all outputs, so far."""
        return sum(len(runner.choice.journal.tokens) for runner in self.runners)

    def events(self) -> AsyncGenerator[Event, None]:
        """What the caller is to see of all outputs. Raises CallError when one of them fails."""
        return self.runners[0].events() if len(self.runners) == 1 else merged(self.runners)

    def _runner(self, index: int) -> Runner:
        request, plan = self.request, self.plan
        rules = ChoiceRules(
            max_new_tokens=plan.max_new_tokens,
            min_new_tokens=plan.min_new_tokens,
            stop_token_ids=frozenset(plan.stop_token_ids),
            include_stop=request.stops.include_stop,
        )
        stops = request.stops.strings
        choice = Choice(
            index,
            rules,
            self.text.detokeniser(plan.prompt_ids, keep_special=request.output.keep_special_tokens),
            StopScanner(stops, include_stop=request.stops.include_stop) if stops else None,
        )
        return Runner(
            choice,
            self._sequence(index),
            self._tools,
            context=self.caller.context,
            arrival_s=self.caller.arrival_s,
            queue_timeout_s=request.queue_timeout_s or None,
            meters=self.meters,
        )

    def _sequence(self, index: int) -> SequenceRequest:
        request, plan, caller = self.request, self.plan, self.caller
        return SequenceRequest(
            request_id=self._internal_id if index == 0 else f"{self._internal_id[:120]}.{index}",
            model_version=self.version.digest,
            tenant=caller.tenant,
            priority=int(request.priority),
            arrival_unix_ms=caller.arrival_unix_ms,
            deadline_unix_ms=caller.deadline_unix_ms,
            attempt=1,
            prompt_ids=plan.prompt_ids,
            output_ids=(),
            sampling=plan.sampling,
            seed=plan.seed_of(index),
            max_new_tokens=plan.max_new_tokens,
            min_new_tokens=plan.min_new_tokens,
            stop_token_ids=plan.stop_token_ids,
            logprobs=request.output.logprobs,
            top_logprobs=request.output.top_logprobs,
            cache_salt=request.cache_salt,
            prefix=self._prefix,
            ttft_slo_ms=caller.ttft_slo_ms,
            model_bytes=self.version.weight_bytes,
        )
