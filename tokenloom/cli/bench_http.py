"""A load client for any server that speaks OpenAI's HTTP API with streaming."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import aiohttp
import orjson

from tokenloom.bench import prompts
from tokenloom.bench.prompts import Calibration, Item
from tokenloom.bench.stats import Record
from tokenloom.cli.bench_load import RequestFailed
from tokenloom.cli.bench_sse import Stream, error_reason

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LOOKUP_S = 30.0
CONNECT_S = 10.0


class HttpTarget:
    """One model of one server. A connection for each request in flight, kept for the next one."""

    def __init__(self, url: str, endpoint: Endpoint, timeout_s: float) -> None:
        self.url = url
        self.model = ""
        self.calibration = Calibration()
        self._endpoint = endpoint
        self._path = url + PATHS[endpoint]
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )

    async def close(self) -> None:
        await self._session.close()

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
        return orjson.dumps(self._body(prompts.text(item, seed, self.calibration), item.output_tokens))

    async def ask(self, request: bytes, record: Record) -> None:
        try:
            async with self._session.post(self._path, data=request) as response:
                if response.status != 200:
                    record.error = error_reason(_parsed(await response.read()), response.status)[0]
                    return
                stream = Stream(record)
                async for data in response.content.iter_any():
                    stream.feed(data, time.perf_counter())
                if not stream.done and not record.error:
                    record.error = "CUT_OFF"
        except aiohttp.ClientConnectorError:
            record.error = "CONNECT"
        except TimeoutError:
            record.error = "TIMEOUT"
        except (aiohttp.ClientError, OSError):
            record.error = "DISCONNECTED"
        except (ValueError, KeyError, AttributeError, TypeError):
            record.error = "NOT_UNDERSTOOD"

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

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=LOOKUP_S, sock_connect=CONNECT_S)
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._session.request(method, self.url + path, data=data, timeout=timeout) as response:
                parsed = _parsed(await response.read())
                if response.status != 200:
                    raise RequestFailed(*error_reason(parsed, response.status))
                if not isinstance(parsed, dict):
                    raise RequestFailed(
                        "NOT_UNDERSTOOD", f"{path} answered with something else than an object"
                    )
                return parsed
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed("CONNECT", str(error)) from None
        except TimeoutError:
            raise RequestFailed("TIMEOUT", f"no answer to {path} within {LOOKUP_S:.0f} s") from None
        except aiohttp.ClientError as error:
            raise RequestFailed("DISCONNECTED", str(error)) from None


def _parsed(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data[:300].decode("utf-8", "replace")
