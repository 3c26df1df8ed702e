"""A load client for any server that speaks OpenAI's HTTP API with streaming."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from tokenloom.bench import prompts
from tokenloom.bench.prompts import Calibration, Item
from tokenloom.bench.stats import Record
from tokenloom.cli.bench_load import RequestFailed
from tokenloom.cli.bench_sse import Stream, error_reason
from tokenloom.cli.bench_wire import Answer, Connection, Disconnected, Take

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LOOKUP_S = 30.0
CONNECT_S = 10.0


class NotConnected(Exception):
    """The server cannot be reached."""


class HttpTarget:
    """One model of one server. A connection for each request in flight, kept for the next one."""

    def __init__(self, url: str, endpoint: Endpoint, timeout_s: float) -> None:
        self.model = ""
        self.calibration = Calibration()
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._server = urlsplit(url)
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._headers = f"Host: {self._server.netloc.rpartition('@')[2]}\r\nAuthorization: Bearer {key}\r\n"
        self._idle: list[Connection] = []

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
        # Transports close in the loop's next turn.
        await asyncio.sleep(0)

    async def models(self) -> list[str]:
        """What the server offers. Raises RequestFailed."""
        body = await self._json("GET", "/v1/models", None)
        return [str(model["id"]) for model in body.get("data", [])]

    async def count(self, text: str) -> int:
        """Tokens of a prompt, template included, as its usage tells. Raises RequestFailed."""
        body = self._body(text, 1) | {"stream": False}
        del body["stream_options"]
        usage = (await self._json("POST", PATHS[self._endpoint], body)).get("usage") or {}
        return int(usage.get("prompt_tokens", 0))

    def prepare(self, item: Item, seed: int) -> bytes:
        body = self._body(prompts.text(item, seed, self.calibration), item.output_tokens)
        return self._request("POST", PATHS[self._endpoint], body)

    async def ask(self, request: bytes, record: Record) -> None:
        stream = Stream(record)
        try:
            answer = await self._exchange(request, self._timeout_s, stream.feed)
        except NotConnected:
            record.error = "CONNECT"
        except TimeoutError:
            record.error = "TIMEOUT"
        except Disconnected:
            record.error = "DISCONNECTED"
        except (ValueError, KeyError, AttributeError, TypeError):
            record.error = "NOT_UNDERSTOOD"
        else:
            if answer.status != 200:
                record.error = error_reason(_parsed(answer.body), answer.status)[0]
            elif not stream.done and not record.error:
                record.error = "CUT_OFF"

    def _body(self, text: str, output_tokens: int) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": text}
        if self._endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": text}]}
        return prompt | {
            "model": self.model,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = b"" if body is None else orjson.dumps(body)
        stated = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        head = f"{method} {self._server.path}{path} HTTP/1.1\r\n{self._headers}{stated}\r\n"
        return head.encode("latin-1") + data

    async def _exchange(self, request: bytes, timeout_s: float, take: Take | None = None) -> Answer:
        """Raises NotConnected, TimeoutError, Disconnected, and what is wrong with the answer."""
        async with asyncio.timeout(timeout_s):
            connection = await self._connection()
            answer = await connection.ask(request, take)
        self._idle.append(connection)
        return answer

    async def _connection(self) -> Connection:
        """One that nobody uses, or a new one."""
        while self._idle:
            if (kept := self._idle.pop()).usable:
                return kept
        secure = self._server.scheme == "https"
        port = self._server.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            try:
                host = self._server.hostname or "localhost"
                _, connection = await loop.create_connection(Connection, host, port, ssl=secure or None)
            except OSError as error:
                raise NotConnected(str(error)) from None
        return connection

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            answer = await self._exchange(self._request(method, path, body), LOOKUP_S)
        except NotConnected as error:
            raise RequestFailed("CONNECT", str(error)) from None
        except TimeoutError:
            raise RequestFailed("TIMEOUT", f"no answer to {path} within {LOOKUP_S:.0f} s") from None
        except Disconnected:
            raise RequestFailed("DISCONNECTED", f"the server went away while it answered {path}") from None
        except ValueError as error:
            raise RequestFailed("NOT_UNDERSTOOD", f"{path}: {error}") from None
        parsed = _parsed(answer.body)
        if answer.status != 200:
            raise RequestFailed(*error_reason(parsed, answer.status))
        if not isinstance(parsed, dict):
            raise RequestFailed("NOT_UNDERSTOOD", f"{path} answered with something else than an object")
        return parsed


def _parsed(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data[:300].decode("utf-8", "replace")
