"""Reading an HTTP request's JSON body within a bound, and answering errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from services.gateway.core.openai_render import error_body
from services.gateway.core.refusal import Violation
from tokenloom.kit.errors import CallError

BUSY_STATUSES = (429, 503)
RETRY_AFTER_DEFAULT_S = 1


async def read_json(scope: Scope, receive: Receive, bytes_max: int) -> dict[str, object]:
    """The body as an object. Raises CallError: too large, no UTF-8, no JSON, no object; ClientDisconnect."""
    data = await _read(scope, receive, bytes_max)
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CallError(
            "REQUEST_MALFORMED", f"the body is no JSON in UTF-8: {error}", metadata={"method": scope["path"]}
        ) from None
    if not isinstance(body, dict):
        raise CallError(
            "REQUEST_MALFORMED", "the body must be a JSON object", metadata={"method": scope["path"]}
        )
    return body


async def _read(scope: Scope, receive: Receive, bytes_max: int) -> bytes:
    stated = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
    if stated.isdigit() and int(stated) > bytes_max:
        raise _too_large(int(stated), bytes_max)
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size += len(part := message.get("body", b""))
        if size > bytes_max:
            raise _too_large(size, bytes_max)
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: int, bytes_max: int) -> CallError:
    return CallError(
        "REQUEST_TOO_LARGE",
        f"the body has {size} bytes or more; at most {bytes_max} are taken",
        metadata={"field": "body", "size": str(size), "limit": str(bytes_max)},
    )


def json_of(error: CallError) -> dict[str, object]:
    """OpenAI's error object."""
    violations = [Violation(field, why) for field, why in error.violations]
    if not violations and error.reason == "MODEL_NOT_FOUND":
        violations = [Violation("model", error.message)]
    return error_body(error.message, error.http_type, error.reason, violations)


def error_response(error: CallError, headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer, with Retry-After where another try may help."""
    extra = dict(headers or {})
    if error.http_status in BUSY_STATUSES and error.retriable:
        hint = RETRY_AFTER_DEFAULT_S if error.retry_after_s is None else error.retry_after_s
        extra["retry-after"] = str(max(1, ceil(hint)))
    return json_response(json_of(error), status=error.http_status, headers=extra)


def json_response(
    body: Mapping[str, object], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`body` as JSON."""
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")
