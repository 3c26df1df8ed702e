"""`tokenloom generate`: one call of the public API, its text written as it comes."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from loom.inference.v1 import inference_pb2 as pb
from loom.inference.v1 import inference_pb2_grpc as rpc

from tokenloom.cli import local, traces
from tokenloom.cli.errors import CliError
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error

DEFAULT_ADDRESS = "127.0.0.1:8080"
LOOKUP_S = 10.0


@dataclass(frozen=True)
class Ask:
    """What to generate. Absent values are left to the model."""

    prompt: str
    model: str | None = None
    raw: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    timeout_s: float = 600.0


@dataclass
class Answer:
    """What came back."""

    request_id: str
    model_version: str = ""
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.__dict__)

    def summary(self) -> str:
        """One line for a person."""
        rate = self.completion_tokens / self.total_s if self.total_s else 0.0
        return (
            f"{self.completion_tokens} tokens, {rate:.1f}/s, first after {self.first_token_s * 1e3:.0f} ms"
            f" · {self.finish_reason} · {self.model_version}"
        )


def address_or_default(address: str | None) -> str:
    """The address asked for, else that of the running mesh, else the default one."""
    if address:
        return address
    mesh = local.running()
    return mesh.address if mesh else DEFAULT_ADDRESS


def generate(ask: Ask, address: str, write: Callable[[str], None]) -> Answer:
    """Make the call; `write` gets each piece of text. Raises CliError."""
    try:
        return asyncio.run(_generate(ask, address, write))
    except CallError as error:
        raise CliError(explain(error, address)) from None


def explain(error: CallError, address: str) -> str:
    """One line that names the cure where there is one."""
    if error.reason == "SERVICE_UNAVAILABLE" and local.running() is None:
        return f"nothing answers at {address}: start a mesh with `tokenloom up`, or name one with --address"
    return f"{error.reason}: {error.message}"


def to_request(ask: Ask, model: str) -> pb.GenerateRequest:
    """The request as the public API takes it."""
    request = pb.GenerateRequest(model=model)
    if ask.raw:
        request.prompt = ask.prompt
    else:
        request.chat.messages.add(role="user", content=ask.prompt)
    if ask.max_tokens is not None:
        request.stop.max_new_tokens = ask.max_tokens
    if ask.temperature is not None:
        request.sampling.temperature = ask.temperature
    if ask.seed is not None:
        request.sampling.seed = ask.seed
    return request


async def _generate(ask: Ask, address: str, write: Callable[[str], None]) -> Answer:
    channel = open_channel(address)
    try:
        stub = rpc.InferenceServiceStub(channel)
        model = ask.model or await _only_model(stub)
        return await _stream(stub, to_request(ask, model), ask.timeout_s, write)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        await channel.close(None)


async def _only_model(stub: Any) -> str:
    """The one model that is served. Raises CliError when there are several, or none."""
    models = (await stub.ListModels(pb.ListModelsRequest(), timeout=LOOKUP_S)).models
    if len(models) != 1:
        there = ", ".join(m.name for m in models) or "none"
        raise CliError(f"say which model with --model; there are: {there}")
    return str(models[0].name)


async def _stream(
    stub: Any, request: pb.GenerateRequest, timeout_s: float, write: Callable[[str], None]
) -> Answer:
    answer = Answer(request_id=str(uuid.uuid4()))
    loop = asyncio.get_running_loop()
    began = loop.time()
    call = stub.Generate(request, timeout=timeout_s, metadata=(("x-request-id", answer.request_id),))
    try:
        async for response in call:
            if response.HasField("started"):
                traces.note_last_request(local.last_request_file(), answer.request_id)
                answer.first_token_s = loop.time() - began
                answer.model_version = response.started.model_version
            if response.HasField("delta"):
                answer.text += response.delta.text
                write(response.delta.text)
            if response.HasField("finished"):
                _settle(answer, response.finished)
        answer.total_s = loop.time() - began
        return answer
    finally:
        call.cancel()


def _settle(answer: Answer, finished: pb.Finished) -> None:
    reason = pb.FinishReason.Name(finished.reason)
    answer.finish_reason = reason.removeprefix("FINISH_REASON_").lower()
    answer.prompt_tokens = finished.usage.prompt_tokens
    answer.cached_prompt_tokens = finished.usage.cached_prompt_tokens
    answer.completion_tokens = finished.usage.completion_tokens
