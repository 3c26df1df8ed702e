"""`loom.inference.v1.InferenceService`: translates messages, decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from loom.inference.v1 import inference_pb2 as pb

from services.gateway.callers import REQUEST_ID, Caller, request_id_of, tenant_of, ttft_slo_ms_of
from services.gateway.core.catalogue import ModelEntry, ModelVersion
from services.gateway.core.choice import Event, PositionLogprobs
from services.gateway.core.notices import deprecation_headers
from services.gateway.core.ports import ModelText
from services.gateway.core.refusal import Refusal, Violation
from services.gateway.core.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Output,
    Priority,
    Prompt,
    Sampling,
    Stops,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.generation import Generation
from services.gateway.pipeline import Ask, Pipeline, call_error
from services.gateway.runner import Runner
from tokenloom.kit.deadlines import deadline_unix_ms
from tokenloom.kit.server import Call


class InferenceServicer:
    """The typed door."""

    def __init__(self, pipeline: Pipeline, default_timeout_s: float) -> None:
        self._pipeline = pipeline
        self._default_timeout_s = default_timeout_s

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncIterator[pb.GenerateResponse]:
        asked = request_of(request)
        caller = self._caller(call, "chat" if isinstance(asked.prompt, ChatPrompt) else "text_completion")
        async with (
            self._pipeline.generation(Ask(asked, _problems(request)), caller) as generation,
            aclosing(generation.events()) as events,
        ):
            call.set_initial([(REQUEST_ID, caller.request_id), *deprecation_headers(generation.version)])
            first = True
            async for event in events:
                response = _response(event, generation)
                if first:
                    response.started.CopyFrom(_started(generation))
                    first = False
                if response.ListFields():
                    yield response

    async def CountTokens(self, request: pb.CountTokensRequest, call: Call) -> pb.CountTokensResponse:
        tokens, context_length = await self._pipeline.count(request.model, _prompt(request))
        return pb.CountTokensResponse(tokens=tokens, context_length=context_length)

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        entries = sorted(self._pipeline.catalogue().models.values(), key=lambda entry: entry.name)
        models = [
            _model(entry, version) for entry in entries if (version := entry.representative()) is not None
        ]
        return pb.ListModelsResponse(models=models)

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        version = self._pipeline.resolve(request.model)
        entry = self._pipeline.catalogue().models[version.name]
        # The message has no field for it.
        call.set_initial([*deprecation_headers(version)])
        return pb.GetModelResponse(model=_model(entry, version))

    def _caller(self, call: Call, operation: str) -> Caller:
        try:
            request_id, tenant = request_id_of(call.metadata), tenant_of(call.metadata)
            ttft_slo_ms = ttft_slo_ms_of(call.metadata)
        except Refusal as refusal:
            raise call_error(refusal) from None
        clock = self._pipeline.clock
        return Caller(
            door="grpc",
            operation=operation,
            request_id=request_id,
            tenant=tenant,
            arrival_unix_ms=clock.unix_ms(),
            arrival_s=clock.monotonic(),
            deadline_unix_ms=deadline_unix_ms(call, clock, self._default_timeout_s),
            ttft_slo_ms=ttft_slo_ms,
            context=call.context,
            span=call.span,
            streams=True,
        )


def request_of(message: pb.GenerateRequest) -> GenerationRequest:
    """The internal request; fields that were not set stay None."""
    output, timeout = message.output, message.queue_timeout
    return GenerationRequest(
        model=message.model,
        prompt=_prompt(message),
        sampling=_sampling(message.sampling),
        stops=_stops(message.stop),
        output=Output(
            logprobs=output.logprobs,
            top_logprobs=output.top_logprobs,
            token_ids=output.token_ids,
            keep_special_tokens=output.keep_special_tokens,
            choice_count=output.choice_count if output.HasField("choice_count") else 1,
        ),
        priority=Priority(_PRIORITY_OF.get(message.priority, Priority.STANDARD)),
        session_key=message.session_key,
        cache_salt=message.cache_salt,
        queue_timeout_s=timeout.ToNanoseconds() / 1e9 if message.HasField("queue_timeout") else None,
    )


_PRIORITY_OF: dict[int, Priority] = {0: Priority.STANDARD} | {int(p): p for p in Priority}


def _problems(message: pb.GenerateRequest) -> list[Violation]:
    """What the internal request cannot even hold."""
    if message.priority in _PRIORITY_OF:
        return []
    return [Violation("priority", f"{message.priority} is no priority: use 1 to {max(Priority):d}")]


def _prompt(message: pb.GenerateRequest | pb.CountTokensRequest) -> Prompt | None:
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "prompt_token_ids":
            return TokenPrompt(tuple(message.prompt_token_ids.ids))
        case "chat":
            chat = message.chat
            messages = tuple(
                ChatMessage(m.role, m.content, m.name if m.HasField("name") else None) for m in chat.messages
            )
            opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
            return ChatPrompt(messages, opens)
        case _:
            return None


def _sampling(s: pb.SamplingParams) -> Sampling:
    return Sampling(
        temperature=s.temperature if s.HasField("temperature") else None,
        top_p=s.top_p if s.HasField("top_p") else None,
        top_k=s.top_k if s.HasField("top_k") else None,
        min_p=s.min_p if s.HasField("min_p") else None,
        repetition_penalty=s.repetition_penalty if s.HasField("repetition_penalty") else None,
        presence_penalty=s.presence_penalty if s.HasField("presence_penalty") else None,
        frequency_penalty=s.frequency_penalty if s.HasField("frequency_penalty") else None,
        seed=s.seed if s.HasField("seed") else None,
        logit_bias=dict(s.logit_bias),
    )


def _stops(s: pb.StopConditions) -> Stops:
    return Stops(
        max_new_tokens=s.max_new_tokens if s.HasField("max_new_tokens") else None,
        min_new_tokens=s.min_new_tokens if s.HasField("min_new_tokens") else 0,
        strings=tuple(s.stop),
        token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        include_stop=s.include_stop,
    )


def _response(event: Event, generation: Generation) -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    wanted = generation.request.output
    if event.text or ((wanted.token_ids or wanted.logprobs) and event.token_ids):
        delta = response.delta
        delta.choice = event.choice
        delta.text = event.text
        if wanted.token_ids:
            delta.token_ids.extend(event.token_ids)
        if event.logprobs:
            pairs = zip(event.token_ids, event.logprobs, strict=False)
            delta.logprobs.extend(_position(i, position, generation.text) for i, position in pairs)
    if event.end is not None:
        response.finished.CopyFrom(_finished(event, generation))
    return response


def _position(token_id: int, position: PositionLogprobs, text: ModelText) -> pb.PositionLogprobs:
    def one(i: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=i, logprob=logprob, token=text.token_bytes(i))

    top = zip(position.top_ids, position.top, strict=False)
    return pb.PositionLogprobs(
        chosen=one(token_id, position.chosen), top=[one(i, logprob) for i, logprob in top]
    )


def _started(generation: Generation) -> pb.Started:
    started = pb.Started(
        request_id=generation.caller.request_id,
        model_version=generation.version.full_name,
        prompt_tokens=generation.prompt_tokens,
        cached_prompt_tokens=generation.cached_prompt_tokens,
        seed=generation.plan.sampling.seed,
    )
    started.created_at.FromMilliseconds(generation.caller.arrival_unix_ms)
    return started


def _finished(event: Event, generation: Generation) -> pb.Finished:
    assert event.end is not None
    runner = generation.runners[event.choice]
    finished = pb.Finished(
        choice=event.choice,
        reason=pb.FinishReason.ValueType(event.end.reason),
        matched_stop=event.end.matched_stop,
        matched_stop_token_id=event.end.stop_token_id,
        usage=pb.Usage(
            prompt_tokens=generation.prompt_tokens,
            cached_prompt_tokens=runner.cached_prompt_tokens,
            completion_tokens=len(runner.choice.journal.tokens),
        ),
    )
    _fill_timings(finished.timings, runner, generation.caller.arrival_s)
    return finished


def _fill_timings(timings: pb.Timings, runner: Runner, arrival_s: float) -> None:
    first_ns = int(1e9 * (runner.first_token_s or 0.0))
    prefill_ns = runner.finish.prefill_ns if runner.finish is not None else 0
    timings.time_to_first_token.FromNanoseconds(first_ns)
    timings.queued.FromNanoseconds(max(0, first_ns - prefill_ns))
    timings.total.FromNanoseconds(int(1e9 * (runner.last_token_s - arrival_s)))


def _model(entry: ModelEntry, version: ModelVersion) -> pb.Model:
    model = pb.Model(
        name=entry.name,
        version=version.full_name,
        context_length=version.context_length,
        has_chat_template=version.has_chat_template,
        architecture=version.architecture,
        license=version.license,
        aliases={alias: found.digest for alias in entry.aliases if (found := entry.main(alias))},
    )
    model.created_at.FromMilliseconds(version.created_unix_ms)
    return model
