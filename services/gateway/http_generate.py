"""`/v1/chat/completions` and `/v1/completions`: from a body to an answer, streamed or whole.

A caller that leaves takes its generation along: the call to the worker is cancelled at once. Nothing
is sent before the first event, so that an error has its own status.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from opentelemetry.context import get_current
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.callers import (
    REQUEST_ID,
    Caller,
    request_id_of,
    session_key_of,
    tenant_of,
    ttft_slo_ms_of,
)
from services.gateway.core.choice import Event
from services.gateway.core.notices import deprecation_headers
from services.gateway.core.openai_body import ParsedBody
from services.gateway.core.openai_render import DONE, AnswerHead, Renderer, Tally, error_chunk
from services.gateway.core.refusal import Refusal
from services.gateway.generation import Generation
from services.gateway.http_body import error_response, json_of, json_response, read_json
from services.gateway.pipeline import Ask, Pipeline, call_error
from tokenloom.kit import telemetry
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

log = get_logger(__name__)


class GenerateEndpoint:
    """One of the two, as an ASGI application; they differ by their body and their renderer."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        operation: str,
        parse: Callable[[Mapping[str, object]], ParsedBody],
        renderer: type[Renderer],
        body_bytes_max: int,
        default_timeout_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._operation = operation
        self._parse = parse
        self._renderer = renderer
        self._body_bytes_max = body_bytes_max
        self._default_timeout_s = default_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        answer = _Answer(scope, receive, send)
        with telemetry.tracer().start_as_current_span(
            self._operation,
            context=telemetry.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": scope["path"]},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                await self._serve(headers, span, answer)
                span.set_attribute("http.response.status_code", 200)
            except ClientDisconnect:
                span.set_status(Status(StatusCode.ERROR, "cancelled by the caller"))
            except Refusal as refusal:
                await answer.fail(call_error(refusal), span)
            except CallError as error:
                await answer.fail(error, span)
            except Exception as error:
                await answer.fail(_defect(error), span)

    async def _serve(self, headers: Mapping[str, str], span: Span, answer: _Answer) -> None:
        clock = self._pipeline.clock
        arrival_s, arrival_ms = clock.monotonic(), clock.unix_ms()
        answer.request_id = request_id_of(headers)
        tenant, ttft_slo_ms = tenant_of(headers), ttft_slo_ms_of(headers)
        session_key = session_key_of(headers)
        parsed = self._parse(await read_json(answer.scope, answer.receive, self._body_bytes_max))
        if session_key:
            parsed = replace(parsed, request=replace(parsed.request, session_key=session_key))
        caller = Caller(
            door="http",
            operation=self._operation,
            request_id=answer.request_id,
            tenant=tenant,
            arrival_unix_ms=arrival_ms,
            arrival_s=arrival_s,
            deadline_unix_ms=arrival_ms + int(1000 * self._default_timeout_s),
            ttft_slo_ms=ttft_slo_ms,
            context=get_current(),
            span=span,
            streams=parsed.options.stream,
        )
        async with _leaving_with_client(answer):
            await self._generate(parsed, caller, answer)

    async def _generate(self, parsed: ParsedBody, caller: Caller, answer: _Answer) -> None:
        ask = Ask(parsed.request, parsed.problems, parsed.unsupported, parsed.name_of)
        async with (
            self._pipeline.generation(ask, caller) as generation,
            aclosing(generation.events()) as events,
        ):
            renderer = self._renderer(
                AnswerHead(
                    caller.request_id,
                    caller.arrival_unix_ms // 1000,
                    parsed.request.model,
                    generation.version.digest,
                ),
                generation.text.token_bytes,
                include_usage=parsed.options.include_usage,
                token_ids=parsed.request.output.token_ids,
            )
            if parsed.options.stream:
                await _stream(generation, events, renderer, parsed.options.include_usage, answer)
                return
            async for event in events:
                renderer.add(event)
        headers = _headers_of(generation)
        await answer.respond(json_response(renderer.whole(tally_of(generation)), headers=dict(headers)))


async def _stream(
    generation: Generation,
    events: AsyncGenerator[Event, None],
    renderer: Renderer,
    include_usage: bool,
    answer: _Answer,
) -> None:
    """Server-sent events; one chunk for each event that shows anything."""
    output = generation.request.output
    every = output.token_ids or output.logprobs
    async for event in events:
        if not answer.started:
            ours = [(name.encode(), value.encode()) for name, value in _headers_of(generation)]
            headers = [*_SSE_HEADERS, *ours]
            await answer.send({"type": "http.response.start", "status": 200, "headers": headers})
        if event.text or event.end is not None or every:
            await answer.part(renderer.chunk(event))
    last = renderer.usage_chunk(tally_of(generation)) + DONE if include_usage else DONE
    await answer.send({"type": "http.response.body", "body": last, "more_body": False})


def _headers_of(generation: Generation) -> list[tuple[str, str]]:
    return [(REQUEST_ID, generation.caller.request_id), *deprecation_headers(generation.version)]


def tally_of(generation: Generation) -> Tally:
    """What the generation cost so far."""
    return Tally(generation.prompt_tokens, generation.cached_prompt_tokens, generation.completion_tokens)


class _Answer:
    """The way back to one client: what was sent of its answer, and errors in the shape that still fits."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.request_id = ""
        self.started = False
        self.complete = False
        self._send = send

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.started = True
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    def part(self, body: bytes) -> Awaitable[None]:
        """Send more of an answer that has started; not a coroutine of its own, for there is one a token."""
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def respond(self, response: Response) -> None:
        """Send a whole answer."""
        await response(self.scope, self.receive, self.send)

    async def fail(self, error: CallError, span: Span) -> None:
        """Answer with the error: as a status, or as an event when the answer has begun."""
        span.set_attribute("http.response.status_code", error.http_status)
        span.set_attribute("error.type", error.reason)
        span.set_status(Status(StatusCode.ERROR, error.message))
        if self.started:
            last = error_chunk(json_of(error)) + DONE
            await self.send({"type": "http.response.body", "body": last, "more_body": False})
            return
        await self.respond(error_response(error, {REQUEST_ID: self.request_id} if self.request_id else None))


@asynccontextmanager
async def _leaving_with_client(answer: _Answer) -> AsyncIterator[None]:
    """Cancels the block when the client disconnects, which then ends in ClientDisconnect."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await answer.receive())["type"] != "http.disconnect":
            continue
        # A complete answer reads as a disconnect too.
        if not answer.complete:
            left = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # Somebody else may have cancelled us too: only our own cancellation is taken back.
        if left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


def _defect(error: Exception) -> CallError:
    trace_id = telemetry.trace_id_of()
    log.exception("request failed", exc_info=error)
    message = f"internal error; the log of trace {trace_id or 'none'} has the cause"
    return CallError("INTERNAL", message, metadata={"trace_id": trace_id})
