"""Drives one output to its end: calls a worker, and calls again when that breaks.

Re-sending before the first token and resuming after it are one loop: each attempt begins after the
tokens in the journal. What to do after a failure is `core.retry`'s decision; this module waits,
calls, and tells telemetry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from services.gateway import metrics
from services.gateway.core.choice import Choice, Event, WorkerFinish, WorkerMessage
from services.gateway.core.journal import TokenGap
from services.gateway.core.ports import Mesh, SequenceRequest, WorkerStream
from services.gateway.core.retry import Failure, RetryPolicy, is_break
from tokenloom.kit import telemetry
from tokenloom.kit.clock import Clock
from tokenloom.kit.deadlines import seconds_left
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

TRAILERS_WAIT_MAX_S = 1.0
"""After a worker's last word, how long its trailers may take before the call is cut."""
SPAN_NAME = "loom.worker.v1.WorkerService/Generate"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerTools:
    """What every runner of one process shares. `jitter` draws from [0, 1)."""

    mesh: Mesh
    policy: RetryPolicy
    clock: Clock
    jitter: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Runner:
    """One output. `events` may be iterated once."""

    def __init__(
        self,
        choice: Choice,
        request: SequenceRequest,
        tools: RunnerTools,
        *,
        context: Context,
        arrival_s: float,
        queue_timeout_s: float | None,
        meters: metrics.ModelMeters,
    ) -> None:
        """`request` is the first attempt; `arrival_s` is monotonic time."""
        self.choice = choice
        self.cached_prompt_tokens = 0
        self.first_token_s: float | None = None
        """From arrival to the first token."""
        self.last_token_s = 0.0
        self.finish: WorkerFinish | None = None
        self._request = request
        self._tools = tools
        self._context = context
        self._arrival_s = arrival_s
        self._queue_timeout_s = queue_timeout_s
        self._meters = meters
        self._first_token_unix_ns = 0
        self._text_ns = 0

    async def events(self) -> AsyncGenerator[Event, None]:
        """What the caller is to see, until the output ends. Raises CallError when it cannot."""
        choice = self.choice
        while True:
            stream, span = self._begin_attempt()
            error: CallError | None = None
            began = False
            try:
                message = await self._first_message(stream)
                while message is not None:
                    began = True
                    if (event := self._take(message, span)) is not None:
                        yield event
                    if choice.end is not None:
                        await self._see_off(stream, message)
                        return
                    message = await stream.read()
                error = CallError("ENGINE_RESTARTED", "the worker's stream ended before the output did")
            except CallError as failure:
                error = failure
            except TokenGap as gap:
                error = CallError("ENGINE_RESTARTED", f"tokens were lost on the way: {gap}")
            finally:
                stream.cancel()
                self._end_attempt(span, error)
            if (last := choice.end_by_journal()) is not None:
                yield last
                return
            await self._wait_for_next(error, began)

    def _begin_attempt(self) -> tuple[WorkerStream, Span]:
        left_s = self._seconds_left()
        if left_s <= 0:
            raise self._too_late()
        journal = self.choice.journal
        journal.begin_attempt()
        request = replace(self._request, attempt=journal.attempts, output_ids=tuple(journal.tokens))
        attributes: dict[str, AttributeValue] = {
            "rpc.system": "grpc",
            "rpc.method": SPAN_NAME,
            "tokenloom.attempt": journal.attempts,
            "tokenloom.choice": self.choice.index,
            "tokenloom.resumed_tokens": len(journal.tokens),
        }
        span = telemetry.tracer().start_span(
            SPAN_NAME, context=self._context, kind=SpanKind.CLIENT, attributes=attributes
        )
        carrier = telemetry.inject(trace.set_span_in_context(span, self._context))
        return self._tools.mesh.generate(request, timeout_s=left_s, trace=carrier), span

    async def _first_message(self, stream: WorkerStream) -> WorkerMessage | None:
        if self._queue_timeout_s is None or self.choice.journal.tokens:
            return await stream.read()
        try:
            async with asyncio.timeout(self._queue_left_s()):
                return await stream.read()
        except TimeoutError:
            raise self._too_late() from None

    def _take(self, message: WorkerMessage, span: Span) -> Event | None:
        now_s = self._tools.clock.monotonic()
        if message.worker is not None:
            span.set_attribute("tokenloom.worker", message.worker)
            if self.first_token_s is None:
                self.cached_prompt_tokens = message.cached_prompt_tokens
        if self.first_token_s is None:
            self.first_token_s = now_s - self._arrival_s
            self._first_token_unix_ns = self._tools.clock.unix_ns()
            self._meters.first_token.observe(self.first_token_s)
        else:
            self._meters.inter_token.observe(now_s - self.last_token_s)
        self.last_token_s = now_s
        if message.finish is not None:
            self.finish = message.finish
        started_ns = time.perf_counter_ns()
        event = self.choice.take(message)
        self._text_ns += time.perf_counter_ns() - started_ns
        return event

    async def _see_off(self, stream: WorkerStream, last: WorkerMessage) -> None:
        """Let a call that is over end by itself: a cancelled one would keep its usage from the batcher."""
        self._record_text_span()
        if last.finish is None:
            return
        try:
            async with asyncio.timeout(TRAILERS_WAIT_MAX_S):
                await stream.read()
        except (TimeoutError, CallError) as error:
            log.debug("a finished call did not end well", error=str(error))

    def _record_text_span(self) -> None:
        """The time spent on text in all, as one span from the first token on."""
        telemetry.record(
            "detokenise",
            self._first_token_unix_ns,
            self._first_token_unix_ns + self._text_ns,
            self._context,
            {"tokenloom.tokens": len(self.choice.journal.tokens), "tokenloom.choice": self.choice.index},
        )

    def _end_attempt(self, span: Span, error: CallError | None) -> None:
        if error is not None:
            span.set_attribute("error.type", error.reason)
            span.set_status(Status(StatusCode.ERROR, error.message))
            metrics.FAILED_ATTEMPTS.labels(error.reason).inc()
        elif self.choice.end is None:
            span.set_status(Status(StatusCode.ERROR, "cancelled by the caller"))
        span.end()

    async def _wait_for_next(self, error: CallError, began: bool) -> None:
        """Return when the next attempt is due. Raises the error when there is to be none."""
        journal = self.choice.journal
        failure = Failure(error.reason, error.retriable, error.retry_after_s, began)
        if is_break(failure):
            journal.begun_and_broken()
        delay_s = self._tools.policy.delay_s(
            failure, journal, seconds_left=self._seconds_left(), jitter=self._tools.jitter()
        )
        if delay_s is None:
            raise self._too_late() if error.reason == "DEADLINE_EXCEEDED" else error
        kind = "resumed" if journal.tokens else "first_token"
        metrics.RESENT.labels(kind).inc()
        (log.info if is_break(failure) else log.debug)(
            "sending again",
            request_id=self._request.request_id,
            reason=error.reason,
            error=error.message,
            attempt=journal.attempts,
            tokens=len(journal.tokens),
            delay_s=round(delay_s, 3),
        )
        await self._tools.sleep(delay_s)

    def _seconds_left(self) -> float:
        left_s = seconds_left(self._request.deadline_unix_ms, self._tools.clock)
        return left_s if self.choice.journal.tokens else min(left_s, self._queue_left_s())

    def _queue_left_s(self) -> float:
        if self._queue_timeout_s is None:
            return float("inf")
        return self._arrival_s + self._queue_timeout_s - self._tools.clock.monotonic()

    def _too_late(self) -> CallError:
        waited_ms = round(1000 * (self._tools.clock.monotonic() - self._arrival_s))
        if self._queue_left_s() <= 0 and not self.choice.journal.tokens:
            message = f"no worker became free within the request's queue_timeout ({waited_ms} ms waited)"
            return CallError("QUEUE_TIMEOUT", message, metadata={"waited_ms": str(waited_ms)})
        tokens = len(self.choice.journal.tokens)
        return CallError("DEADLINE_EXCEEDED", f"the deadline passed after {waited_ms} ms and {tokens} tokens")
