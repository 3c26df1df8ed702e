"""One model version's text, made of its files: tokenizer, chat template, sampling defaults.

Small prompts are rendered and tokenised on the event loop, where that takes less time than a change
of thread; the others in a pool. `encode_batch_fast` lets other threads run meanwhile; `encode` does
not, and would stop every stream of this process for as long as it takes. Loading a tokenizer does stop
them (a fifth of a second for 50,000 tokens): once for each version, before it is first asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from tokenizers import Tokenizer

from services.gateway.adapters.pieces import Spelling
from services.gateway.adapters.templates import (
    ChatTemplate,
    ChatTemplateError,
    special_tokens,
    template_source,
)
from services.gateway.core.catalogue import ModelVersion
from services.gateway.core.detokenise import ByteDetokeniser, Detokeniser, WindowDetokeniser
from services.gateway.core.plan import SamplingDefaults, defaults_from, far_too_long
from services.gateway.core.refusal import Refusal
from services.gateway.core.request import ChatPrompt, Prompt, TextPrompt, TokenPrompt


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Bounds on one model's text work."""

    inline_chars: int
    """Prompts up to this size are tokenised on the event loop."""
    rendered_chars_max: int


PROBE_CHARS_PER_TOKEN = 8
"""A prompt with more characters than this for each token of the context is looked at in part first:
hardly any text has tokens so long, so most such prompts are refused at a bounded cost."""
PROBE_SLACK_TOKENS = 16
"""Tokens by which a part may differ from the same stretch of the whole."""


class TokenizerText:
    """Implements `ModelText` on `tokenizers` and Jinja."""

    def __init__(
        self, version: ModelVersion, files: Mapping[str, bytes], limits: TextLimits, pool: Executor
    ) -> None:
        """Parses everything, which takes a while: not on the event loop. Raises ValueError."""
        config = _json(files, "tokenizer_config.json")
        self.defaults: SamplingDefaults = defaults_from(_json(files, "generation_config.json"))
        self._model = version.name
        self._context_length = version.context_length
        self._limits = limits
        self._pool = pool
        self._tokenizer = _tokenizer(files["tokenizer.json"])
        self._spelling = Spelling(self._tokenizer)
        self._bos_id = self._read_bos(config, version)
        source = template_source(files, config)
        self._template_error = (
            f"model {self._model!r} has no chat template, so messages cannot be made into its prompt: "
            "use Generate with a prompt (gRPC) or /v1/completions (HTTP)"
        )
        self._template: ChatTemplate | None = None
        if source is not None:
            try:
                self._template = ChatTemplate(
                    source, dict(special_tokens(config)), output_chars_max=limits.rendered_chars_max
                )
            except ChatTemplateError as error:
                self._template_error = f"the chat template of model {self._model!r} is broken: {error}"

    def render(self, chat: ChatPrompt) -> str:
        if self._template is None:
            raise Refusal("CHAT_TEMPLATE_MISSING", self._template_error, metadata={"model": self._model})
        messages = [
            {"role": m.role, "content": m.content} | ({"name": m.name} if m.name is not None else {})
            for m in chat.messages
        ]
        try:
            return self._template.render(messages, add_generation_prompt=chat.add_generation_prompt)
        except ChatTemplateError as error:
            message = f"the chat template of model {self._model!r} refused these messages: {error}"
            raise Refusal("CHAT_TEMPLATE_FAILED", message, metadata={"model": self._model}) from None

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        match prompt:
            case TokenPrompt(ids):
                return ids
            case TextPrompt(text):
                size = len(text)
            case ChatPrompt(messages):
                size = sum(len(message.content) for message in messages)
        if size <= self._limits.inline_chars:
            return self._encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, prompt)

    def detokeniser(self, prompt_ids: Sequence[int], *, keep_special: bool) -> Detokeniser:
        spelling = self._spelling
        if not spelling.by_bytes:
            tokenizer, skip = self._tokenizer, not keep_special
            return WindowDetokeniser(
                lambda ids: tokenizer.decode([*ids], skip_special_tokens=skip), prompt_ids
            )
        # A space before the first word belongs to the text, unless the text begins here.
        strip = spelling.strips_first_space and all(i in spelling.special_ids for i in prompt_ids)
        pieces = spelling.all_pieces if keep_special else spelling.plain_pieces
        return ByteDetokeniser(pieces, strip_first_space=strip)

    def token_bytes(self, token_id: int) -> bytes:
        return self._spelling.all_pieces[token_id]

    def _encode(self, prompt: TextPrompt | ChatPrompt) -> tuple[int, ...]:
        if isinstance(prompt, ChatPrompt):
            # The template writes its own beginning of text.
            return self._ids(self.render(prompt), special=False)
        ids = self._ids(prompt.text, special=True)
        if self._bos_id is not None and ids[:1] != (self._bos_id,):
            return (self._bos_id, *ids)
        return ids

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        probe_chars = PROBE_CHARS_PER_TOKEN * self._context_length
        if len(text) > probe_chars:
            part = self._tokenizer.encode_batch_fast([text[:probe_chars]], add_special_tokens=special)[0]
            if len(part) > self._context_length + PROBE_SLACK_TOKENS:
                raise far_too_long(len(text), self._context_length)
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def _read_bos(self, config: Mapping[str, object], version: ModelVersion) -> int | None:
        """The beginning-of-text token that plain prompts begin with, where the model wants one."""
        if version.bos_token_id is not None or config.get("add_bos_token") is not True:
            return version.bos_token_id
        text = dict(special_tokens(config)).get("bos_token")
        found: int | None = self._tokenizer.token_to_id(text) if text is not None else None
        return found


def _tokenizer(data: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # The library raises bare Exceptions.
        raise ValueError(f"tokenizer.json cannot be read: {error}") from None
    # Training-time settings that some files carry would cut prompts or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(files: Mapping[str, bytes], path: str) -> dict[str, object]:
    if path not in files:
        return {}
    try:
        value = json.loads(files[path])
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}
