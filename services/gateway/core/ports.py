"""What the core's callers need from outside, as Protocols; the adapters fulfil them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.core.catalogue import Catalogue, ModelVersion
from services.gateway.core.choice import WorkerMessage
from services.gateway.core.detokenise import Detokeniser
from services.gateway.core.plan import FilledSampling, SamplingDefaults
from services.gateway.core.request import ChatPrompt, Prompt


class CatalogueSource(Protocol):
    """Where the present catalogue is read."""

    @property
    def snapshot(self) -> Catalogue | None:
        """None until the first one arrived."""
        ...


class ModelText(Protocol):
    """One version's text: tokenizer, chat template, sampling defaults."""

    @property
    def defaults(self) -> SamplingDefaults: ...

    def render(self, chat: ChatPrompt) -> str:
        """The prompt that the template makes. Raises Refusal (CHAT_TEMPLATE_MISSING or _FAILED)."""
        ...

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids, off the event loop where that takes long. Raises as `render`."""
        ...

    def detokeniser(self, prompt_ids: Sequence[int], *, keep_special: bool) -> Detokeniser:
        """A new one, for one output that continues `prompt_ids`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own spelling, which may be part of a character; empty for an unknown id."""
        ...


class TextStore(Protocol):
    """Where texts are had."""

    async def text(self, version: ModelVersion) -> ModelText:
        """Loaded at first use. Raises CallError when the modelstore cannot give it."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One attempt at one output, as a worker is to see it."""

    request_id: str
    model_version: str
    tenant: str
    priority: int
    arrival_unix_ms: int
    deadline_unix_ms: int
    attempt: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    sampling: FilledSampling
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: Sequence[int]
    logprobs: bool
    top_logprobs: int
    cache_salt: str
    prefix: tuple[int, ...]
    ttft_slo_ms: int = 0
    """The caller's wish; 0: none."""
    model_bytes: int = 0
    """Of the version's weights; 0: not known."""


class WorkerStream(Protocol):
    """One call at the mesh."""

    async def read(self) -> WorkerMessage | None:
        """The next message, or None at a good end. Raises CallError for every failure."""
        ...

    def cancel(self) -> None:
        """Leave at once; nothing happens when the call has ended."""
        ...


class Mesh(Protocol):
    """Where sequences are sent."""

    def generate(
        self, request: SequenceRequest, *, timeout_s: float, trace: Sequence[tuple[str, str]]
    ) -> WorkerStream:
        """Begin a call. `trace` is the W3C context as metadata."""
        ...
