"""OpenAI's chat messages into the internal ones: text only, every other part refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from services.gateway.core.json_fields import Fields, kind_of
from services.gateway.core.request import ChatMessage
from services.gateway.core.validation import MESSAGES_MAX

_IGNORED = ("annotations", "reasoning", "reasoning_content", "refusal", "tool_call_id")
"""What clients send back from earlier answers, and what text templates do not use."""
_REFUSED = ("audio", "function_call", "tool_calls")
_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}
_KNOWN_PARTS = ("image_url", "input_audio", "file", "video_url", "audio_url", "input_image")


def read_messages(fields: Fields) -> tuple[ChatMessage, ...] | None:
    """The messages as far as they can be read; None when there is no list of them."""
    value = fields.raw("messages")
    if value is None:
        fields.problem("messages", "is required")
        return None
    if not isinstance(value, list):
        fields.problem("messages", f"must be a list, not {kind_of(value)}")
        return None
    messages = []
    for number, item in enumerate(value[: MESSAGES_MAX + 1]):
        if isinstance(item, dict):
            messages.append(_message(fields, item, f"messages[{number}]"))
        else:
            fields.problem(f"messages[{number}]", f"must be an object, not {kind_of(item)}")
            messages.append(ChatMessage("user", ""))
    return tuple(messages)


def _message(outer: Fields, item: Mapping[str, object], path: str) -> ChatMessage:
    fields = outer.nested(item, path)
    role = fields.string("role")
    if role is None:
        if item.get("role") is None:
            fields.problem("role", "is required")
        role = "user"
    content = _content(fields, f"{path}.content", outer)
    name = fields.string("name")
    for refused in _REFUSED:
        fields.refuse(refused, lambda value: value in ([], {}))
    fields.ignore(_IGNORED)
    fields.finish()
    # OpenAI renamed the system role for its newer models; templates know the old name.
    return ChatMessage("system" if role == "developer" else role, content, name)


def _content(fields: Fields, path: str, outer: Fields) -> str:
    value = fields.raw("content")
    match value:
        case str():
            return value
        case list():
            return "\n".join(_part(outer, part, f"{path}[{i}]") for i, part in enumerate(value))
        case None:
            fields.problem("content", "is required")
        case _:
            fields.problem("content", f"must be a string or a list of parts, not {kind_of(value)}")
    return ""


def _part(outer: Fields, part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        outer.problem(path, f"must be an object, not {kind_of(part)}")
        return ""
    kind = part.get("type")
    if kind in _KNOWN_PARTS:
        outer.not_offered(f"{path}.{kind}", "send text")
        return ""
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        outer.problem(f"{path}.type", f"must be 'text', not {kind_of(kind)}")
        return ""
    fields = outer.nested(part, path)
    fields.ignore(("type",))
    text = fields.string(_TEXT_PARTS[kind])
    if text is None and part.get(_TEXT_PARTS[kind]) is None:
        fields.problem(_TEXT_PARTS[kind], "is required")
    fields.finish()
    return text or ""
