"""OpenAI's JSON bodies into the internal request.

Every field that OpenAI or vLLM documents is supported, harmless to ignore, or refused by name; a
field that nobody documents is a mistake and is named too. Values are taken as they are: bounds are
`validation`'s, and `ParsedBody.name_of` turns its field names into those of the body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from services.gateway.core.json_fields import Fields, all_integers, kind_of
from services.gateway.core.openai_chat import read_messages
from services.gateway.core.refusal import Violation
from services.gateway.core.request import (
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
from services.gateway.core.validation import SEED_MAX, SESSION_KEY_CHARS_MAX

SEED_MIN = -(2**63)
PRIORITIES = {priority.name.lower(): priority for priority in Priority}

_IGNORED = (
    "include_reasoning",
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
)
_SESSION_FIELDS = ("user", "safety_identifier")
"""Who asks, the first that is given. `prompt_cache_key` is none of them: it names a beginning that many
callers share, and would move them all to one version at once."""


def _empty(value: object) -> bool:
    return value in ("", [], {}, False)


def _is(*neutral: object) -> Callable[[object], bool]:
    return lambda value: value in neutral


_never = _is()

_REFUSED: dict[str, Callable[[object], bool]] = {
    "add_special_tokens": _never,
    "allowed_token_ids": _empty,
    "bad_words": _empty,
    "chat_template": _never,
    "documents": _empty,
    "guided_choice": _empty,
    "guided_decoding_backend": _empty,
    "guided_grammar": _empty,
    "guided_json": _empty,
    "guided_regex": _empty,
    "kv_transfer_params": _empty,
    "length_penalty": _is(1),
    "logits_processors": _empty,
    "mm_processor_kwargs": _empty,
    "prompt_logprobs": _never,
    "request_id": _never,
    "response_format": _is({"type": "text"}),
    "return_tokens_as_token_ids": _empty,
    "structured_outputs": _empty,
    "thinking_token_budget": _never,
    "truncate_prompt_tokens": _never,
    "use_beam_search": _empty,
    "vllm_xargs": _empty,
}
_REFUSED_CHAT: dict[str, Callable[[object], bool]] = {
    "audio": _never,
    "chat_template_kwargs": _empty,
    "continue_final_message": _empty,
    "echo": _empty,
    "function_call": _is("none", "auto"),
    "functions": _empty,
    "modalities": _is(["text"]),
    "reasoning_effort": _is("none"),
    "tool_choice": _is("none", "auto"),
    "tools": _empty,
    "verbosity": _is("medium"),
    "web_search_options": _never,
}
_REFUSED_TEXT: dict[str, Callable[[object], bool]] = {
    "echo": _empty,
    "prompt_embeds": _never,
    "suffix": _empty,
}
_INSTEAD = {
    "request_id": "send it as the header x-request-id",
    "chat_template": "the model's own template is used",
    "echo": "put the prompt before the answer yourself",
    "prompt_embeds": "send text or token ids",
}
_NAMES = {
    "input": "prompt",
    "prompt_token_ids": "prompt",
    "chat.messages": "messages",
    "stop.max_new_tokens": "max_tokens",
    "stop.min_new_tokens": "min_tokens",
    "stop.stop_token_ids": "stop_token_ids",
    "stop.stop": "stop",
    "output.choice_count": "n",
}


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How the answer is to come."""

    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """A body as far as it could be read, and what was wrong with the rest."""

    request: GenerationRequest
    options: StreamOptions
    problems: tuple[Violation, ...]
    unsupported: tuple[Violation, ...]
    names: Mapping[str, str]
    """What this body calls the internal request's fields, where the two differ."""

    def name_of(self, field: str) -> str:
        """`sampling.top_p` is `top_p`, `stop.stop[2]` is `stop[2]`."""
        for ours, theirs in self.names.items():
            if field == ours or field.startswith((f"{ours}[", f"{ours}.")):
                return theirs + field[len(ours) :]
        return field.removeprefix("sampling.").removeprefix("output.")


def parse_chat(body: Mapping[str, object]) -> ParsedBody:
    """`POST /v1/chat/completions`."""
    fields = Fields(body)
    messages = read_messages(fields)
    opens_turn = fields.boolean("add_generation_prompt", True)
    prompt = None if messages is None else ChatPrompt(messages, opens_turn)
    logprobs, top = fields.boolean("logprobs"), fields.integer("top_logprobs")
    newer, older = fields.integer("max_completion_tokens"), fields.integer("max_tokens")
    fields.ignore(("parallel_tool_calls",))
    return _parse(
        fields,
        _REFUSED | _REFUSED_CHAT,
        prompt,
        _NAMES if newer is None else _NAMES | {"stop.max_new_tokens": "max_completion_tokens"},
        max_new_tokens=older if newer is None else newer,
        logprobs=logprobs,
        top_logprobs=top or 0,
    )


def parse_text(body: Mapping[str, object]) -> ParsedBody:
    """`POST /v1/completions`."""
    fields = Fields(body)
    top = fields.integer("logprobs")
    prompt = _text_prompt(fields)
    best_of, n = fields.integer("best_of"), fields.raw("n")
    if best_of is not None and best_of != (1 if n is None else n):
        fields.not_offered("best_of")
    return _parse(
        fields,
        _REFUSED | _REFUSED_TEXT,
        prompt,
        _NAMES | {"output.top_logprobs": "logprobs"},
        max_new_tokens=fields.integer("max_tokens"),
        logprobs=top is not None,
        top_logprobs=top or 0,
    )


def _parse(
    fields: Fields,
    refused: Mapping[str, Callable[[object], bool]],
    prompt: Prompt | None,
    names: Mapping[str, str],
    *,
    max_new_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
) -> ParsedBody:
    """The fields that both bodies share."""
    model = fields.string("model")
    if not model:
        fields.problem("model", "is required")
    request = GenerationRequest(
        model=model or "",
        prompt=prompt,
        sampling=_sampling(fields),
        stops=_stops(fields, max_new_tokens),
        output=_output(fields, logprobs, top_logprobs),
        priority=_priority(fields),
        session_key=_session_key(fields),
        cache_salt=fields.string("cache_salt") or "",
    )
    options = _stream_options(fields)
    for name, neutral in refused.items():
        fields.refuse(name, neutral, _INSTEAD.get(name, ""))
    fields.ignore(_IGNORED)
    fields.finish()
    return ParsedBody(request, options, tuple(fields.problems), tuple(fields.unsupported), names)


def _text_prompt(fields: Fields) -> Prompt | None:
    value = fields.raw("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    match value:
        case str():
            return TextPrompt(value)
        case list() if all_integers(value):
            return TokenPrompt(tuple(value))
        case list() if len(value) > 1 and all(isinstance(item, (str, list)) for item in value):
            fields.not_offered("prompt", "send one prompt a request")
        case None:
            fields.problem("prompt", "is required")
        case _:
            fields.problem("prompt", f"must be a string or a list of token ids, not {kind_of(value)}")
    return None


def _sampling(fields: Fields) -> Sampling:
    seed = fields.integer("seed")
    if seed is not None and not SEED_MIN <= seed <= SEED_MAX:
        fields.problem("seed", f"must be from {SEED_MIN} to {SEED_MAX}")
        seed = None
    top_k = fields.integer("top_k")
    return Sampling(
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        # vLLM writes "off" as -1.
        top_k=0 if top_k == -1 else top_k,
        min_p=fields.number("min_p"),
        repetition_penalty=fields.number("repetition_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        frequency_penalty=fields.number("frequency_penalty"),
        # OpenAI's seeds are signed.
        seed=None if seed is None else seed % (SEED_MAX + 1),
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    value = fields.raw("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        fields.problem("logit_bias", f"must be an object, not {kind_of(value)}")
        return {}
    bias: dict[int, float] = {}
    for key, amount in value.items():
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if number and re.fullmatch("[0-9]{1,10}", key):
            bias[int(key)] = amount
        else:
            fields.problem("logit_bias", f"{key[:32]!r}: must map a token id to a number")
    return bias


def _stops(fields: Fields, max_new_tokens: int | None) -> Stops:
    return Stops(
        max_new_tokens=max_new_tokens,
        min_new_tokens=fields.integer("min_tokens") or 0,
        strings=fields.strings("stop"),
        token_ids=fields.token_ids("stop_token_ids"),
        ignore_eos=fields.boolean("ignore_eos"),
        include_stop=fields.boolean("include_stop_str_in_output"),
    )


def _output(fields: Fields, logprobs: bool, top_logprobs: int) -> Output:
    choices = fields.integer("n")
    return Output(
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        token_ids=fields.boolean("return_token_ids"),
        keep_special_tokens=not fields.boolean("skip_special_tokens", True),
        choice_count=1 if choices is None else choices,
    )


def _priority(fields: Fields) -> Priority:
    value = fields.raw("priority")
    # 0 is vLLM's default, sent by clients that know no other.
    if value is None or (value == 0 and value is not False):
        return Priority.STANDARD
    if isinstance(value, str) and value.lower() in PRIORITIES:
        return PRIORITIES[value.lower()]
    fields.problem("priority", f"must be one of {', '.join(PRIORITIES)}, not {kind_of(value)}")
    return Priority.STANDARD


def _session_key(fields: Fields) -> str:
    given = [fields.string(name) or "" for name in _SESSION_FIELDS]
    key = next(filter(None, given), "")
    if len(key) <= SESSION_KEY_CHARS_MAX:
        return key
    # OpenAI bounds neither, and only sameness counts.
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def _stream_options(fields: Fields) -> StreamOptions:
    stream = fields.boolean("stream")
    value = fields.raw("stream_options")
    if value is None:
        return StreamOptions(stream)
    if not isinstance(value, dict):
        fields.problem("stream_options", f"must be an object, not {kind_of(value)}")
        return StreamOptions(stream)
    inner = fields.nested(value, "stream_options")
    include_usage = inner.boolean("include_usage")
    inner.refuse("continuous_usage_stats", _empty)
    inner.ignore(("include_obfuscation",))
    inner.finish()
    if not stream:
        fields.problem("stream_options", "needs stream to be true")
    return StreamOptions(stream, include_usage)
