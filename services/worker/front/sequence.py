"""One request as the front follows it: what it asked for, and tokens on their way to the caller.

Tokens of steps that the caller has not read yet are joined, so what is kept is bounded by
`max_new_tokens` however slow the caller is. It knows neither gRPC nor the engine's process.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from services.worker.protocol import Output, Submit, TokenLogprobs
from tokenloom.kit.errors import CallError


class Batch(NamedTuple):
    """What one read of a sequence gives: the tokens of one or more steps."""

    first: bool
    """True for the first read that brings anything."""
    start: int
    """Position of tokens[0] in the whole output."""
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    final: Output | None
    """The engine's last word, when the sequence ended well."""


class Sequence:
    """A sequence from its arrival to its end. `key` names it towards the engine."""

    __slots__ = (
        "_began",
        "_error",
        "_final",
        "_logprobs",
        "_start",
        "_tokens",
        "_waiter",
        "arrival_ms",
        "cached_prompt_tokens",
        "counted_tokens",
        "first_ns",
        "key",
        "last_ns",
        "leased",
        "max_new_tokens",
        "priority",
        "prompt_tokens",
        "received",
        "received_ns",
        "request_id",
        "resumed_tokens",
        "submit",
        "submitted_ns",
        "tenant",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        request_id: str,
        tenant: str,
        leased: bool,
        arrival_ms: int,
        received_ns: int,
    ) -> None:
        self.key = submit.id
        self.submit: Submit | None = submit
        """What the engine is told; dropped once it was."""
        self.request_id = request_id
        self.tenant = tenant
        self.leased = leased
        self.priority = submit.priority
        self.arrival_ms = arrival_ms
        """At the gateway, where the caller said so; older requests go first."""
        self.received_ns = received_ns
        """When this worker got it; this and the next three are epoch nanoseconds, 0 until they happen."""
        self.submitted_ns = 0
        self.first_ns = 0
        self.last_ns = 0
        self.prompt_tokens = len(submit.prompt)
        self.resumed_tokens = len(submit.output)
        self.max_new_tokens = submit.max_new_tokens
        self.received = 0
        """Tokens drawn here."""
        self.cached_prompt_tokens = 0
        self.counted_tokens = 0
        """Those of `received` that its tenant was charged for."""
        self._began = False
        self._tokens: list[int] = []
        self._start = 0
        self._logprobs: list[TokenLogprobs] = []
        self._final: Output | None = None
        self._error: CallError | None = None
        # A bare future: an asyncio.Event costs more than the rest of a token's way through here.
        self._waiter: asyncio.Future[None] | None = None

    @property
    def length(self) -> int:
        """Tokens that its KV cache holds, or soon will."""
        return self.prompt_tokens + self.resumed_tokens + self.received

    @property
    def started(self) -> bool:
        """True once a token came: from then on its blocks are in the engine's own count."""
        return self.received > 0

    @property
    def final(self) -> Output | None:
        """The engine's last word, once it came."""
        return self._final

    @property
    def completion_tokens(self) -> int:
        """Output tokens in all, those of earlier workers included."""
        return self.resumed_tokens + self.received

    def push(self, output: Output, now_ns: int) -> None:
        """Take one step's output; the list of tokens becomes ours."""
        tokens = output.tokens
        if tokens:
            if not self.received:
                self.first_ns = now_ns
            self.last_ns = now_ns
            self.received += len(tokens)
            if self._tokens:
                self._tokens.extend(tokens)
            else:
                self._tokens = tokens
                self._start = output.index
            if output.logprobs:
                self._logprobs.extend(output.logprobs)
        if output.cached_prompt_tokens > self.cached_prompt_tokens:
            self.cached_prompt_tokens = output.cached_prompt_tokens
        if output.finish:
            self._final = output
        self._wake()

    def fail(self, error: CallError) -> None:
        """End it with an error, after the tokens that are already here. The first error counts."""
        if self._error is None and self._final is None:
            self._error = error
            self._wake()

    async def next(self) -> Batch:
        """Wait for news and take them; for one reader. Raises the CallError that ended the sequence."""
        while not self._tokens and self._final is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batch = Batch(not self._began, self._start, self._tokens, self._logprobs, self._final)
        self._began = True
        self._tokens = []
        if self._logprobs:
            self._logprobs = []
        return batch

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
