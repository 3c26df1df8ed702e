"""The running mesh's workers: what is resident on each, and loading and unloading there.

A worker is one of the local mesh, by name or by endpoint, or any `host:port`. Bounds: a look takes
`LOOK_S`, a load `LOAD_MAX_S`, an unload `UNLOAD_MAX_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from loom.worker.v1 import worker_pb2 as pb
from loom.worker.v1 import worker_pb2_grpc as rpc

from tokenloom.cli import local
from tokenloom.cli.errors import CliError
from tokenloom.cli.state import Mesh
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error

LOOK_S = 3.0
LOAD_MAX_S = 6 * 3600.0
"""A large model over a slow line takes hours; the worker gives up by itself when nothing moves."""
UNLOAD_MAX_S = 3600.0
"""An unload waits for the sequences that run."""
SUBSCRIBER = "cli"
ALL = "all"

STATES = {
    number: name.removeprefix("MODEL_STATE_").lower() for name, number in pb.ModelState.items() if number
}


@dataclass(frozen=True)
class Worker:
    """`name`: `worker-0` in a local mesh, else the endpoint. `target`: `host:port`."""

    name: str
    target: str


@dataclass(frozen=True)
class Residence:
    """One version on one worker: ready, or on its way there or away."""

    worker: Worker
    model: pb.ResidentModel

    @property
    def state(self) -> str:
        """`fetching`, `loading`, `ready`, `draining` or `failed`."""
        return STATES.get(self.model.state, "unknown")


@dataclass(frozen=True)
class Seen:
    """What the workers answered."""

    residences: tuple[Residence, ...]
    silent: tuple[Worker, ...] = ()
    """Those that did not answer."""

    def of(self, digest: str) -> list[Residence]:
        """Where this version is."""
        return [each for each in self.residences if each.model.version == digest]

    def by_version(self) -> dict[str, list[Residence]]:
        """Residences of each digest."""
        return {each.model.version: self.of(each.model.version) for each in self.residences}


def workers_of(mesh: Mesh) -> list[Worker]:
    """The local mesh's workers, in their order."""
    return [
        Worker(process.name, f"127.0.0.1:{process.ports['grpc']}")
        for process in mesh.processes
        if process.name.partition("-")[0] == "worker" and "grpc" in process.ports
    ]


def running() -> list[Worker]:
    """The running mesh's workers; none when no mesh runs."""
    mesh = local.running()
    return workers_of(mesh) if mesh else []


def chosen(wanted: str | None) -> list[Worker]:
    """Workers by what `--worker` says; None and `all` are all of the local mesh. Raises CliError."""
    there = running()
    if wanted is None or wanted == ALL:
        if not there:
            raise CliError("no mesh is running: start one with `tokenloom up`, or give --worker host:port")
        return there
    found = [worker for worker in there if wanted in (worker.name, worker.target)]
    if found:
        return found
    host, colon, port = wanted.rpartition(":")
    if host and colon and port.isascii() and port.isdigit():
        return [Worker(wanted, wanted)]
    names = ", ".join(worker.name for worker in there) or "none, since no mesh is running"
    raise CliError(f"no worker {wanted!r} (there: {names}); give a name, host:port or all", status=2)


async def look(workers: Sequence[Worker]) -> Seen:
    """What is resident where; a worker that does not answer within `LOOK_S` is named, not waited for."""
    answers = await asyncio.gather(*(_models(worker) for worker in workers))
    residences = [
        Residence(worker, model)
        for worker, models in zip(workers, answers, strict=True)
        for model in models or ()
    ]
    silent = [worker for worker, models in zip(workers, answers, strict=True) if models is None]
    return Seen(tuple(residences), tuple(silent))


async def _models(worker: Worker) -> list[pb.ResidentModel] | None:
    async with _stub(worker) as stub:
        try:
            return list((await stub.ListModels(pb.ListModelsRequest(), timeout=LOOK_S)).models)
        except grpc.aio.AioRpcError:
            return None


async def report(worker: Worker) -> pb.LoadReport:
    """A worker's load report now. Raises CliError when it does not answer."""
    async with _stub(worker) as stub:
        try:
            async for answer in stub.WatchLoad(pb.WatchLoadRequest(subscriber=SUBSCRIBER), timeout=LOOK_S):
                found: pb.LoadReport = answer.report
                return found
        except grpc.aio.AioRpcError as error:
            raise CliError(explain(worker, from_rpc_error(error))) from None
    raise CliError(f"{worker.name} ended its reports at once; see `tokenloom logs {worker.name}`")


async def roomiest(workers: Sequence[Worker], digest: str) -> Worker:
    """Where to load a version when nobody said: where it is already, else where most memory is free.

    Raises CliError when no worker answers.
    """
    if len(workers) == 1:
        return workers[0]
    answers = await asyncio.gather(*(report(worker) for worker in workers), return_exceptions=True)
    failed: list[BaseException] = []
    best: tuple[tuple[bool, bool, int], Worker] | None = None
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, BaseException):
            failed.append(answer)
            continue
        here = any(m.version == digest and m.state != pb.MODEL_STATE_FAILED for m in answer.models)
        rank = (not answer.draining, here, answer.free_memory_bytes)
        if best is None or rank > best[0]:
            best = (rank, worker)
    if best is None:
        raise failed[0]
    return best[1]


async def load(
    worker: Worker, digest: str, *, evict: bool, tell: Callable[[pb.LoadReport], None]
) -> pb.ResidentModel:
    """Make a version resident; `tell` gets the worker's reports meanwhile. Raises CallError."""
    async with _stub(worker) as stub:
        watching = asyncio.create_task(_watch(stub, tell))
        try:
            request = pb.LoadModelRequest(version=digest, evict=evict)
            model: pb.ResidentModel = (await stub.LoadModel(request, timeout=LOAD_MAX_S)).model
            return model
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def unload(worker: Worker, digest: str) -> None:
    """End a version's engine once its sequences are done. Raises CallError."""
    async with _stub(worker) as stub:
        try:
            await stub.UnloadModel(pb.UnloadModelRequest(version=digest), timeout=UNLOAD_MAX_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


async def _watch(stub: Any, tell: Callable[[pb.LoadReport], None]) -> None:
    """Reports until cancelled. Only shown: when they break off, the load itself still says how it ends."""
    try:
        async for answer in stub.WatchLoad(pb.WatchLoadRequest(subscriber=SUBSCRIBER)):
            tell(answer.report)
    except grpc.aio.AioRpcError:
        return


def explain(worker: Worker, error: CallError) -> str:
    """One line. The worker's message has the figures and the cure."""
    if error.reason == "SERVICE_UNAVAILABLE":
        return f"{worker.name} at {worker.target} does not answer; see `tokenloom status`"
    line = f"{worker.name}: {error.reason}: {error.message}"
    if error.retry_after_s is not None and "try again" not in error.message:
        line += f"; try again in {max(error.retry_after_s, 0.1):.1f} s"
    return line


@asynccontextmanager
async def _stub(worker: Worker) -> AsyncIterator[Any]:
    channel = open_channel(worker.target)
    try:
        yield rpc.WorkerServiceStub(channel)
    finally:
        await channel.close(None)


def names(residences: Iterable[Residence]) -> str:
    """`worker-0, worker-1`."""
    return ", ".join(dict.fromkeys(each.worker.name for each in residences))
