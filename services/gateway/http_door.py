"""The OpenAI-compatible HTTP API as one ASGI application: routes, models, health, version."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.core.catalogue import Deprecation, ModelVersion
from services.gateway.core.notices import deprecation_headers
from services.gateway.core.openai_body import parse_chat, parse_text
from services.gateway.core.openai_render import ChatRenderer, TextRenderer, error_body
from services.gateway.http_body import error_response, json_response
from services.gateway.http_generate import GenerateEndpoint
from services.gateway.pipeline import Pipeline
from tokenloom import __version__
from tokenloom.kit.errors import CallError

OWNER = "tokenloom"


def make_app(pipeline: Pipeline, *, body_bytes_max: int, default_timeout_s: float) -> ASGIApp:
    """The application. Bounds: bytes of one body, seconds of one generation."""
    generate = partial(
        GenerateEndpoint, pipeline, body_bytes_max=body_bytes_max, default_timeout_s=default_timeout_s
    )
    chat = generate(operation="chat", parse=parse_chat, renderer=ChatRenderer)
    text = generate(operation="text_completion", parse=parse_text, renderer=TextRenderer)
    door = _Models(pipeline)
    rest = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/v1/models", door.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", door.get_model, methods=["GET"]),
            Route("/health", door.health, methods=["GET"]),
            Route("/version", _version, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error, CallError: _call_error, Exception: _defect},
    )
    return _Door({"/v1/chat/completions": chat, "/v1/completions": text}, rest)


class _Door:
    """Hands generations over directly: each layer of Starlette's would be one more hop for every token."""

    def __init__(self, generating: Mapping[str, ASGIApp], rest: ASGIApp) -> None:
        self._generating = generating
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._rest
        if scope["type"] == "http" and scope["method"] == "POST":
            app = self._generating.get(scope["path"], app)
        await app(scope, receive, send)


class _Models:
    """What can be asked beside generating."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def list_models(self, _: Request) -> Response:
        names = self._pipeline.catalogue().names()
        models = [_model(name, self._pipeline.resolve(name)) for name in names]
        return json_response({"object": "list", "data": models})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        version = self._pipeline.resolve(name)
        return json_response(_model(name, version), headers=dict(deprecation_headers(version)))

    async def health(self, _: Request) -> Response:
        why_not = self._pipeline.readiness()
        return json_response({"status": why_not or "ok"}, status=503 if why_not else 200)


async def _version(_: Request) -> Response:
    return json_response({"version": __version__})


def _model(name: str, version: ModelVersion) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": version.created_unix_ms // 1000,
        "owned_by": OWNER,
        "root": version.full_name,
        "parent": None,
        "max_model_len": version.context_length,
        "deprecated": _deprecated(version.deprecation),
    }


def _deprecated(deprecation: Deprecation | None) -> dict[str, object] | None:
    if deprecation is None:
        return None
    return {"message": deprecation.message, "since": deprecation.since_unix_ms // 1000}


async def _http_error(request: Request, error: Exception) -> Response:
    """Wrong paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    known = "this server has /v1/chat/completions, /v1/completions, /v1/models, /health and /version"
    message = f"{where}: {error.detail}; {known}"
    body = error_body(message, "invalid_request_error", str(error.detail).replace(" ", "_"))
    return json_response(body, status=error.status_code, headers=error.headers)


async def _call_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, CallError)
    return error_response(error)


async def _defect(_: Request, __: Exception) -> Response:
    """Anything else; the server behind this application logs it."""
    return error_response(CallError("INTERNAL", "internal error; the gateway's log has the cause"))
