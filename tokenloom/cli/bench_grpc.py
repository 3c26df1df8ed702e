"""A load client for the gRPC API of the mesh, `loom.inference.v1`."""

from __future__ import annotations

import time
from typing import Any

import grpc
from loom.inference.v1 import inference_pb2 as pb
from loom.inference.v1 import inference_pb2_grpc as rpc

from tokenloom.bench import prompts
from tokenloom.bench.prompts import Calibration, Item
from tokenloom.bench.stats import Record
from tokenloom.cli.bench_load import RequestFailed
from tokenloom.kit.channels import ChannelPool
from tokenloom.kit.errors import from_rpc_error

CONNECTIONS = 4
"""A client keeps a few connections; each carries many streams."""
LOOKUP_S = 30.0


class GrpcTarget:
    """One model of one mesh."""

    def __init__(self, address: str, raw: bool, timeout_s: float) -> None:
        self.model = ""
        self.calibration = Calibration()
        self._raw = raw
        self._timeout_s = timeout_s
        self._pool = ChannelPool(address, CONNECTIONS)

    async def close(self) -> None:
        await self._pool.close()

    async def models(self) -> list[str]:
        """What the mesh offers. Raises RequestFailed."""
        try:
            listed = await self._stub().ListModels(pb.ListModelsRequest(), timeout=LOOKUP_S)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        return [model.name for model in listed.models]

    async def count(self, text: str) -> int:
        """Tokens of a prompt, template included. Raises RequestFailed."""
        request = pb.CountTokensRequest(model=self.model)
        self._put(request, text)
        try:
            return int((await self._stub().CountTokens(request, timeout=LOOKUP_S)).tokens)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None

    def prepare(self, item: Item, seed: int) -> pb.GenerateRequest:
        tokens = item.output_tokens
        request = pb.GenerateRequest(
            model=self.model,
            sampling=pb.SamplingParams(temperature=0),
            stop=pb.StopConditions(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True),
        )
        self._put(request, prompts.text(item, seed, self.calibration))
        return request

    async def ask(self, request: pb.GenerateRequest, record: Record) -> None:
        call = self._stub().Generate(request, timeout=self._timeout_s)
        finished = False
        try:
            async for message in call:
                if message.delta.text:
                    record.pieces_s.append(time.perf_counter())
                if message.HasField("finished"):
                    finished = True
                    usage = message.finished.usage
                    record.prompt_tokens = usage.prompt_tokens
                    record.cached_prompt_tokens = usage.cached_prompt_tokens
                    record.output_tokens = usage.completion_tokens
            if not finished:
                record.error = "CUT_OFF"
        except grpc.aio.AioRpcError as error:
            record.error = _failed(error).reason
        finally:
            call.cancel()

    def _put(self, request: pb.GenerateRequest | pb.CountTokensRequest, text: str) -> None:
        if self._raw:
            request.prompt = text
        else:
            request.chat.messages.add(role="user", content=text)

    def _stub(self) -> Any:
        return rpc.InferenceServiceStub(self._pool.next())


def _failed(error: grpc.aio.AioRpcError) -> RequestFailed:
    failure = from_rpc_error(error)
    reason = "CONNECT" if failure.reason == "SERVICE_UNAVAILABLE" else failure.reason
    return RequestFailed(reason, failure.message)
