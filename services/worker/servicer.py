"""gRPC in, front out: translates `loom.worker.v1` and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.publisher import Published, Publisher
from services.worker.front.report import resident_model
from services.worker.front.requests import tenant_of, to_response, to_submit, usage_of
from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from services.worker.front.worker import Worker
from tokenloom.contract import headers
from tokenloom.kit.clock import Clock
from tokenloom.kit.deadlines import deadline_unix_ms, seconds_left
from tokenloom.kit.errors import CallError
from tokenloom.kit.server import Call

Observe = Callable[[Sequence, Resident, str, Call], None]
"""Hears how a sequence ended: `stop`, `length`, `cancelled`, or an error's reason."""


class WorkerServicer:
    """`loom.worker.v1.WorkerService`."""

    def __init__(
        self,
        worker: Worker,
        publisher: Publisher,
        clock: Clock,
        observe: Observe,
        refused: Callable[[str], None],
        *,
        default_timeout_s: float,
        drain_grace_s: float,
    ) -> None:
        self._worker = worker
        self._publisher = publisher
        self._clock = clock
        self._observe = observe
        self._refused = refused
        self._default_timeout_s = default_timeout_s
        self._drain_grace_s = drain_grace_s
        self._drains: set[asyncio.Task[int]] = set()

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncIterator[pb.GenerateResponse]:
        """Run one sequence."""
        worker = self._worker
        try:
            resident, sequence, left_s = self._open(request, call)
        except CallError as error:
            self._refused(error.reason)
            raise
        del request
        call.set_initial([(headers.WORKER, worker.endpoint)])
        timer = asyncio.get_running_loop().call_later(left_s, worker.expire, sequence)
        outcome = "cancelled"
        try:
            while True:
                batch = await sequence.next()
                if batch.final is not None:
                    usage = usage_of(sequence, batch.final)
                    call.set_trailing([(headers.USAGE_BIN, usage.SerializeToString())])
                    outcome = batch.final.finish
                yield to_response(batch, sequence, worker.endpoint)
                if batch.final is not None:
                    return
        except CallError as error:
            outcome = error.reason
            raise
        finally:
            timer.cancel()
            worker.end(sequence)
            self._observe(sequence, resident, outcome, call)

    async def WatchLoad(self, request: pb.WatchLoadRequest, call: Call) -> AsyncIterator[Published]:
        """Push load reports."""
        async with aclosing(self._publisher.listen()) as reports:
            async for report in reports:
                yield report
        raise CallError("DRAINING", "the worker is going away", metadata={"service": "worker"})

    async def LoadModel(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        """Make a model resident; the load goes on when the caller leaves."""
        resident = await self._worker.load(request.version, evict=request.evict)
        return pb.LoadModelResponse(model=resident_model(resident))

    async def UnloadModel(self, request: pb.UnloadModelRequest, call: Call) -> pb.UnloadModelResponse:
        """End a model's engine once its sequences are done."""
        await self._worker.models.unload(request.version)
        return pb.UnloadModelResponse()

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """What is resident, or on its way."""
        return pb.ListModelsResponse(models=[resident_model(r) for r in self._worker.models.all()])

    async def Drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:
        """Take no new sequences; answers when the present ones ended or were handed back."""
        grace_s = request.grace_ms / 1000 if request.grace_ms else self._drain_grace_s
        drain = asyncio.create_task(self._worker.drain(grace_s), name="drain")
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)
        return pb.DrainResponse(remaining=await asyncio.shield(drain))

    def _open(self, request: pb.GenerateRequest, call: Call) -> tuple[Resident, Sequence, float]:
        worker = self._worker
        resident = worker.choose(request.model_version)
        submit = to_submit(
            request,
            worker.next_key(),
            context_length=resident.context_length,
            vocab_size=resident.vocab_size,
        )
        left_s = seconds_left(self._deadline_ms(call), self._clock)
        if left_s <= 0:
            raise CallError("DEADLINE_EXCEEDED", "the request's deadline passed before it arrived")
        sequence = Sequence(
            submit,
            request_id=request.request_id,
            tenant=tenant_of(request),
            leased=headers.LEASE in call.metadata,
            arrival_ms=_whole(call, headers.ARRIVAL_UNIX_MS, self._clock.unix_ms()),
            received_ns=self._clock.unix_ns(),
        )
        worker.begin(resident, sequence)
        return resident, sequence, left_s

    def _deadline_ms(self, call: Call) -> int:
        by_call = deadline_unix_ms(call, self._clock, self._default_timeout_s)
        return min(by_call, _whole(call, headers.DEADLINE_UNIX_MS, by_call))


def _whole(call: Call, name: str, default: int) -> int:
    """A header that must be a whole number where it is given. Raises FIELD_INVALID."""
    text = call.metadata.get(name)
    if text is None:
        return default
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 16:
        return int(text)
    raise CallError(
        "FIELD_INVALID", f"{name}: must be a whole number of milliseconds", metadata={"field": name}
    )
