"""What a caller does with the public gRPC API, in the few lines that tests need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from loom.inference.v1 import inference_pb2 as pb
from loom.inference.v1 import inference_pb2_grpc as rpc

from tokenloom.kit.channels import ChannelPool
from tokenloom.kit.errors import CallError, from_rpc_error


@dataclass
class Answer:
    """One whole stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    deltas: int = 0
    started: pb.Started | None = None
    finished: pb.Finished | None = None
    error: CallError | None = None


def greedy(prompt: str | Sequence[int], tokens: int, model: str) -> pb.GenerateRequest:
    """A request for exactly `tokens` greedy tokens."""
    request = pb.GenerateRequest(
        model=model,
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopConditions(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True),
        output=pb.OutputOptions(token_ids=True),
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.prompt_token_ids.ids.extend(prompt)
    return request


class Client:
    """Calls through `connections` connections, as many callers would."""

    def __init__(self, pool: ChannelPool) -> None:
        self._pool = pool

    def stub(self) -> rpc.InferenceServiceStub:
        return rpc.InferenceServiceStub(self._pool.next())

    async def generate(
        self, request: pb.GenerateRequest, timeout_s: float = 120, request_id: str = ""
    ) -> Answer:
        """The whole answer; errors are returned, not raised."""
        answer = Answer()
        metadata = [("x-request-id", request_id)] if request_id else None
        call = self.stub().Generate(request, timeout=timeout_s, metadata=metadata)
        try:
            async for message in call:
                if message.HasField("started"):
                    answer.started = message.started
                if message.HasField("delta"):
                    answer.text += message.delta.text
                    answer.token_ids += message.delta.token_ids
                    answer.deltas += 1
                if message.HasField("finished"):
                    answer.finished = message.finished
        except grpc.aio.AioRpcError as error:
            answer.error = from_rpc_error(error)
        finally:
            call.cancel()
        return answer

    async def generate_all(
        self, requests: Sequence[pb.GenerateRequest], timeout_s: float = 120
    ) -> list[Answer]:
        """All at once."""
        return await asyncio.gather(*(self.generate(r, timeout_s) for r in requests))


@asynccontextmanager
async def connected(target: str, connections: int = 1) -> AsyncIterator[Client]:
    pool = ChannelPool(target, connections)
    try:
        yield Client(pool)
    finally:
        await pool.close()
