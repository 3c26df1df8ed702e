"""The internal events into OpenAI's JSON: server-sent chunks, and whole answers.

A chunk is made of bytes prepared once for its stream and the text of one event: no dictionary is
built for a token. Whole answers are dictionaries, for the door to encode.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring

from services.gateway.core.choice import End, Event
from services.gateway.core.openai_logprobs import TextLogprobs, TokenBytes, chat_entries
from services.gateway.core.refusal import Violation
from services.gateway.core.request import Finish

DONE = b"data: [DONE]\n\n"
FINISH_NAMES = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.CANCELLED: "stop",
    Finish.BUDGET: "length",
}
_FINGERPRINT_HEX = 12


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every part of one answer repeats. `model` is the caller's own spelling."""

    request_id: str
    created_unix_s: int
    model: str
    version_digest: str

    @property
    def fingerprint(self) -> str:
        """Names the immutable version that answered."""
        return f"fp_{self.version_digest.removeprefix('sha256:')[:_FINGERPRINT_HEX]}"


@dataclass(frozen=True, slots=True)
class Tally:
    """What an answer cost, in tokens."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, object]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_prompt_tokens},
        }


class Renderer(ABC):
    """One answer's shape; subclasses say how chat and text completions differ."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(
        self, head: AnswerHead, token_bytes: TokenBytes, *, include_usage: bool, token_ids: bool
    ) -> None:
        self._token_bytes = token_bytes
        self._token_ids = token_ids
        self._outputs: dict[int, _Output] = {}
        self._common: dict[str, object] = {
            "id": self.id_prefix + head.request_id,
            "created": head.created_unix_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        start = _compact({"object": self.chunk_name, **self._common})[:-1]
        self._prefix = f'data: {start},"choices":[{{"index":'.encode()
        self._suffix = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def chunk(self, event: Event) -> bytes:
        """One event as a server-sent chunk."""
        output = self._output(event.choice)
        plain = event.end is None and not event.logprobs and not self._token_ids
        text = encode_basestring(event.text).encode()
        body = self._body(output, text)
        output.begun = True
        rest = _UNFINISHED if plain else self._extra(event)
        return b"".join((self._prefix, b"%d," % event.choice, body, rest, self._suffix))

    def usage_chunk(self, tally: Tally) -> bytes:
        """The last chunk, when the caller asked for usage."""
        whole = {"object": self.chunk_name, **self._common, "choices": [], "usage": tally.as_json()}
        return f"data: {_compact(whole)}\n\n".encode()

    def add(self, event: Event) -> None:
        """Keep an event for the whole answer."""
        output = self._output(event.choice)
        output.texts.append(event.text)
        output.ids += event.token_ids
        if event.logprobs:
            output.logprobs.append(self._logprobs(output, event))
        if event.end is not None:
            output.end = event.end

    def whole(self, tally: Tally) -> dict[str, object]:
        """The answer that is not streamed, of the events added."""
        choices = [self._choice(index, self._outputs[index]) for index in sorted(self._outputs)]
        return {"object": self.object_name, **self._common, "choices": choices, "usage": tally.as_json()}

    def _output(self, index: int) -> _Output:
        output = self._outputs.get(index)
        if output is None:
            output = self._outputs[index] = _Output(TextLogprobs(self._token_bytes))
        return output

    def _extra(self, event: Event) -> bytes:
        """The rest of a chunk's choice, when it is more than the constant."""
        output = self._output(event.choice)
        rest: dict[str, object] = {
            "logprobs": self._logprobs(output, event) if event.logprobs else None,
            "finish_reason": None if event.end is None else FINISH_NAMES[event.end.reason],
        }
        if event.end is not None and event.end.matched_stop is not None:
            rest["stop_reason"] = event.end.matched_stop
        if self._token_ids:
            rest["token_ids"] = list(event.token_ids)
        return ("," + _compact(rest)[1:-1]).encode()

    def _choice(self, index: int, output: _Output) -> dict[str, object]:
        end = output.end or End(Finish.STOP)
        choice: dict[str, object] = {
            "index": index,
            **self._content("".join(output.texts)),
            "logprobs": self._joined(output.logprobs) if output.logprobs else None,
            "finish_reason": FINISH_NAMES[end.reason],
        }
        if end.matched_stop is not None:
            choice["stop_reason"] = end.matched_stop
        if self._token_ids:
            choice["token_ids"] = output.ids
        return choice

    @abstractmethod
    def _body(self, output: _Output, text: bytes) -> bytes:
        """The chunk's text member, of JSON text."""

    @abstractmethod
    def _content(self, text: str) -> dict[str, object]:
        """The answer's text member."""

    @abstractmethod
    def _logprobs(self, output: _Output, event: Event) -> Mapping[str, list[object]]:
        """In this endpoint's shape."""

    def _joined(self, parts: Sequence[Mapping[str, list[object]]]) -> dict[str, list[object]]:
        return {key: [item for part in parts for item in part[key]] for key in parts[0]}


class ChatRenderer(Renderer):
    """`/v1/chat/completions`."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def _body(self, output: _Output, text: bytes) -> bytes:
        start = b'"delta":{"content":' if output.begun else b'"delta":{"role":"assistant","content":'
        return start + text + b"}"

    def _content(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, output: _Output, event: Event) -> Mapping[str, list[object]]:
        return {"content": [*chat_entries(event.token_ids, event.logprobs, self._token_bytes)]}


class TextRenderer(Renderer):
    """`/v1/completions`."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def _body(self, output: _Output, text: bytes) -> bytes:
        return b'"text":' + text

    def _content(self, text: str) -> dict[str, object]:
        return {"text": text}

    def _logprobs(self, output: _Output, event: Event) -> Mapping[str, list[object]]:
        return output.text_logprobs.columns(event.token_ids, event.logprobs)


class _Output:
    """One choice as far as it came."""

    def __init__(self, text_logprobs: TextLogprobs) -> None:
        self.begun = False
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[Mapping[str, list[object]]] = []
        self.end: End | None = None
        self.text_logprobs = text_logprobs


_UNFINISHED = b',"logprobs":null,"finish_reason":null'


def error_body(
    message: str, error_type: str, reason: str, violations: Sequence[Violation] = ()
) -> dict[str, object]:
    """OpenAI's error object. `code` is the reason in lower case, `param` the first field named."""
    return {
        "error": {
            "message": message,
            "type": error_type,
            "param": violations[0].field if violations else None,
            "code": reason.lower(),
        }
    }


def error_chunk(body: Mapping[str, object]) -> bytes:
    """An error inside a stream whose status was sent already."""
    return f"data: {_compact(body)}\n\n".encode()


def _compact(value: Mapping[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
