"""A request's way through the gateway: admission, text to tokens, outputs, accounts.

Both doors use this and nothing below it. It puts the core's decisions into effect; it knows no
protobuf and no HTTP.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from services.gateway import metrics, spans
from services.gateway.callers import Caller
from services.gateway.core.canaries import Canaries, Turn
from services.gateway.core.catalogue import Candidates, Catalogue, ModelVersion
from services.gateway.core.plan import Plan, make_plan
from services.gateway.core.ports import CatalogueSource, ModelText, TextStore
from services.gateway.core.refusal import Refusal, Violation, invalid, unsupported
from services.gateway.core.request import GenerationRequest, Prompt
from services.gateway.core.validation import (
    ModelLimits,
    check_prompt_bytes,
    prompt_violations,
    violations,
)
from services.gateway.generation import Generation
from services.gateway.runner import RunnerTools
from tokenloom.contract.models import parse_model
from tokenloom.contract.prefix import BLOCK_TOKENS, WIRE_STRIDE, block_hashes, root_hash, wire_hashes
from tokenloom.kit import telemetry
from tokenloom.kit.errors import CallError

PREFIX_INLINE_TOKENS = 4096
"""Longer prompts are hashed in a thread."""
RETRY_WHEN_FULL_S = 1.0


def _same(field: str) -> str:
    return field


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as a door read it: what it could read, and what was wrong with the rest."""

    request: GenerationRequest
    problems: Sequence[Violation] = ()
    unsupported: Sequence[Violation] = ()
    name_of: Callable[[str], str] = _same
    """The door's name for a field of the internal request."""


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """Bounds on what is taken in."""

    requests_max: int
    prompt_bytes_max: int


class Pipeline:
    """Takes requests in and hands out generations."""

    def __init__(
        self,
        catalogue: CatalogueSource,
        texts: TextStore,
        tools: RunnerTools,
        limits: PipelineLimits,
        canaries: Canaries,
        draw_seed: Callable[[], int],
    ) -> None:
        """`draw_seed` gives seeds in [0, 2**64) for callers that choose none."""
        self.clock = tools.clock
        self.draining = False
        self._catalogue = catalogue
        self._texts = texts
        self._tools = tools
        self._limits = limits
        self._canaries = canaries
        self._draw_seed = draw_seed
        self._open: set[str] = set()

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def readiness(self) -> str:
        """Empty when requests can be taken, else one line why not."""
        if self.draining:
            return "draining"
        return "" if self._catalogue.snapshot is not None else "no catalogue from the modelstore yet"

    def catalogue(self) -> Catalogue:
        """The present catalogue. Raises CallError before the first one came."""
        if self._catalogue.snapshot is None:
            message = "the model catalogue has not arrived yet: the modelstore cannot be reached"
            raise CallError(
                "SERVICE_UNAVAILABLE", message, metadata={"service": "modelstore"}, retry_after_s=1
            )
        return self._catalogue.snapshot

    def resolve(self, model: str) -> ModelVersion:
        """The version that a model string mainly stands for now: asking is no traffic. Raises CallError."""
        try:
            return self._candidates(model).main
        except Refusal as refusal:
            raise call_error(refusal) from None

    async def count(self, model: str, prompt: Prompt | None) -> tuple[int, int]:
        """(tokens of the prompt, the model's context length). Raises CallError."""
        try:
            version = self._candidates(model).main
            if found := [*prompt_violations(prompt, _limits_of(version))]:
                raise invalid(found)
            assert prompt is not None
            check_prompt_bytes(prompt, self._limits.prompt_bytes_max)
            text = await self._texts.text(version)
            return len(await text.encode(prompt)), version.context_length
        except Refusal as refusal:
            raise call_error(refusal) from None

    @asynccontextmanager
    async def generation(self, ask: Ask, caller: Caller) -> AsyncIterator[Generation]:
        """A generation that is ready to run; its accounts are settled when the block ends.

        Raises CallError for everything that is wrong with the request or keeps it from running.
        """
        operation = caller.operation
        account = spans.Account(caller, ask.request)
        metrics.OPEN.inc()
        internal_id = self._enter(caller.request_id)
        try:
            try:
                generation = await self._prepare(ask, caller, internal_id)
            except Refusal as refusal:
                raise call_error(refusal) from None
            account.began(generation)
            yield generation
            account.outcome = "ok"
        except CallError as error:
            account.outcome = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            account.outcome = "cancelled"
            raise
        finally:
            self._open.discard(internal_id)
            metrics.OPEN.dec()
            metrics.REQUESTS.labels(caller.door, operation, account.outcome).inc()
            account.settle(self.clock.monotonic())

    def _enter(self, request_id: str) -> str:
        """The name that the mesh knows the request by: the caller's, made unique among those open here."""
        name = request_id
        while name in self._open:
            name = f"{request_id[:100]}~{uuid.uuid4().hex[:12]}"
        self._open.add(name)
        return name

    async def _prepare(self, ask: Ask, caller: Caller, internal_id: str) -> Generation:
        request = ask.request
        with telemetry.span("admission", context=caller.context):
            version = self._admit(ask)
            text = await self._texts.text(version)
        assert request.prompt is not None
        with (
            telemetry.span("tokenise", context=caller.context) as span,
            metrics.TOKENISE.time(),
        ):
            prompt_ids = await text.encode(request.prompt)
            span.set_attribute("tokenloom.prompt_tokens", len(prompt_ids))
        if not prompt_ids:
            raise invalid([Violation(ask.name_of("input"), "has no tokens")])
        plan = make_plan(
            request,
            prompt_ids,
            context_length=version.context_length,
            model_stop_ids=version.stop_token_ids,
            defaults=text.defaults,
            seed=self._draw_seed(),
        )
        prefix = await _prefix(plan, version, request.cache_salt)
        return self._generation(request, caller, internal_id, version, text, plan, prefix)

    def _generation(
        self,
        request: GenerationRequest,
        caller: Caller,
        internal_id: str,
        version: ModelVersion,
        text: ModelText,
        plan: Plan,
        prefix: tuple[int, ...],
    ) -> Generation:
        return Generation(
            request=request,
            caller=caller,
            internal_id=internal_id,
            version=version,
            text=text,
            plan=plan,
            prefix=prefix,
            tools=self._tools,
        )

    def _admit(self, ask: Ask) -> ModelVersion:
        """The version to use, from here to the request's end, whatever becomes of its name.

        Raises Refusal with everything that is wrong with the request.
        """
        self._check_room()
        request, chosen, unknown = ask.request, None, None
        found = [*ask.problems]
        if request.model:
            try:
                chosen = self._choose(request)
            except Refusal as refusal:
                unknown = refusal
        else:
            found.append(Violation("model", "is required"))
        version, turn = chosen or (None, None)
        limits = None if version is None else _limits_of(version)
        found += [Violation(ask.name_of(v.field), v.why) for v in violations(request, limits)]
        found += unknown.violations if unknown is not None else ()
        if found:
            raise invalid(_first_of_each_field(found))
        if ask.unsupported:
            raise unsupported(ask.unsupported)
        if version is None or turn is None or request.prompt is None:
            raise unknown or AssertionError("a request without problems has a model and a prompt")
        check_prompt_bytes(request.prompt, self._limits.prompt_bytes_max, ask.name_of)
        # Only now: requests that are refused use up nobody's turn.
        turn.take()
        return version

    def _choose(self, request: GenerationRequest) -> tuple[ModelVersion, Turn]:
        candidates = self._candidates(request.model)
        turn = self._canaries.turn(candidates.alias, candidates.targets, request.session_key)
        return candidates.version(turn.target), turn

    def _check_room(self) -> None:
        if self.draining:
            raise CallError("DRAINING", "this gateway is shutting down", metadata={"service": "gateway"})
        limit = self._limits.requests_max
        if len(self._open) > limit:
            raise CallError(
                "QUEUE_FULL",
                f"this gateway holds {limit} requests, its limit",
                metadata={"queue": "gateway", "limit": str(limit)},
                retry_after_s=RETRY_WHEN_FULL_S,
            )

    def _candidates(self, model: str) -> Candidates:
        try:
            ref = parse_model(model)
        except ValueError as error:
            raise invalid([Violation("model", str(error))]) from None
        return self.catalogue().candidates(ref)


def call_error(refusal: Refusal) -> CallError:
    """A refusal of the core's as both doors send it."""
    violations = [(violation.field, violation.why) for violation in refusal.violations]
    return CallError(refusal.reason, refusal.message, metadata=refusal.metadata, violations=violations)


def _first_of_each_field(found: Sequence[Violation]) -> list[Violation]:
    """One complaint a field: a value that could not be read is not also out of bounds."""
    first: dict[str, Violation] = {}
    for violation in found:
        first.setdefault(violation.field, violation)
    return [*first.values()]


def _limits_of(version: ModelVersion) -> ModelLimits:
    return ModelLimits(version.context_length, version.vocab_size)


async def _prefix(plan: Plan, version: ModelVersion, salt: str) -> tuple[int, ...]:
    """What the batcher compares prompts by: one hash for each 512 tokens."""
    ids = plan.prompt_ids
    if len(ids) < BLOCK_TOKENS * WIRE_STRIDE:
        return ()
    hashes = partial(block_hashes, ids, root_hash(version.digest, salt))
    return wire_hashes(hashes() if len(ids) <= PREFIX_INLINE_TOKENS else await asyncio.to_thread(hashes))
