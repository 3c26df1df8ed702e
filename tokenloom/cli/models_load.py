"""`tokenloom models load | unload`: what the running mesh's workers have resident, by command.

The worker decides: it states what a model needs, evicts what may go, and refuses with numbers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.worker.v1 import worker_pb2
from rich.text import Text

from tokenloom.cli import models_json as plain
from tokenloom.cli import models_workers as workers
from tokenloom.cli.columns import duration
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_common import (
    JsonOption,
    ModelArgument,
    TargetOption,
    err,
    model_reference,
    out,
    resolve,
    with_modelstore,
)
from tokenloom.cli.models_progress import SharesProgress, size
from tokenloom.cli.models_view import short, total_bytes
from tokenloom.cli.models_workers import STATES, Residence, Worker
from tokenloom.contract.models import parse_model
from tokenloom.kit.errors import CallError

WorkerOption = Annotated[
    str | None, typer.Option("--worker", metavar="WORKER", help="worker-0, host:port or all.")
]


@dataclass(frozen=True)
class Loaded:
    """The good end of a load on one worker."""

    residence: Residence
    budget_bytes: int
    seconds: float


def load(
    model: ModelArgument,
    worker: WorkerOption = None,
    evict: Annotated[
        bool, typer.Option("--evict/--no-evict", help="Whether idle models may go to make room.")
    ] = True,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model resident on a worker: by default where it is already, else where most memory is free."""
    there = workers.chosen(worker)
    version = with_modelstore(None, target, lambda m: resolve(m, model))
    ends = asyncio.run(_load_all(there, version, evict, as_json, everywhere=worker is not None))
    good = [end for end in ends if isinstance(end, Loaded)]
    if as_json:
        plain.print_json([_loaded_json(version, end) for end in good])
    else:
        for end in good:
            out.print(_loaded_line(version, end), soft_wrap=True)
    _raise_first([end for end in ends if isinstance(end, CliError)])


async def _load_all(
    there: Sequence[Worker], version: pb.Version, evict: bool, quiet: bool, *, everywhere: bool
) -> list[Loaded | CliError]:
    chosen = list(there) if everywhere else [await workers.roomiest(there, version.digest)]
    with SharesProgress(err, hidden=quiet) as progress:
        views = [LoadView(progress, worker, version, several=len(chosen) > 1) for worker in chosen]
        try:
            return list(await asyncio.gather(*(_load(view, evict) for view in views)))
        except asyncio.CancelledError:
            err.print("the load goes on: see `tokenloom models list`", style="dim")
            raise


class LoadView:
    """What a worker's reports say of one load, as stages of a progress."""

    def __init__(self, progress: SharesProgress, worker: Worker, version: pb.Version, several: bool) -> None:
        self._progress = progress
        self._prefix = f"{worker.name}: " if several else ""
        self.worker = worker
        self.version = version
        self.budget_bytes = 0

    def tell(self, report: worker_pb2.LoadReport) -> None:
        """One report of the worker."""
        self.budget_bytes = report.memory_budget_bytes
        mine = next((m for m in report.models if m.version == self.version.digest), None)
        leaving = [m for m in report.models if m.state == worker_pb2.MODEL_STATE_DRAINING and m is not mine]
        if mine is None or mine.state not in (
            worker_pb2.MODEL_STATE_FETCHING,
            worker_pb2.MODEL_STATE_LOADING,
        ):
            return
        state = STATES[mine.state]
        if state == "loading" and mine.progress == 0 and leaving:
            names = ", ".join(f"{m.name} ({m.running} running)" for m in leaving)
            self._progress.show(f"{self._prefix}waiting for {names} to leave", 0.0)
            return
        words = f"fetching {size(total_bytes(self.version))}" if state == "fetching" else state
        reserved = f", {size(mine.memory_bytes)} reserved" if mine.memory_bytes else ""
        self._progress.show(f"{self._prefix}{words}{reserved}", mine.progress)


async def _load(view: LoadView, evict: bool) -> Loaded | CliError:
    began_s = time.monotonic()
    worker, digest = view.worker, view.version.digest
    try:
        model = await workers.load(worker, digest, evict=evict, tell=view.tell)
        budget = view.budget_bytes or (await workers.report(worker)).memory_budget_bytes
    except CallError as error:
        return CliError(workers.explain(worker, error))
    except CliError as error:
        return error
    return Loaded(Residence(worker, model), budget, time.monotonic() - began_s)


def _loaded_line(version: pb.Version, loaded: Loaded) -> Text:
    residence = loaded.residence
    memory = f"{size(residence.model.memory_bytes)} reserved"
    memory += f" of {size(loaded.budget_bytes)}" if loaded.budget_bytes else ""
    named = f"{version.manifest.name}@{short(version.digest)}"
    line = Text.assemble((named, "bold"), f" is {residence.state} on ", (residence.worker.name, "green"))
    return line.append(f": {memory}, after {duration(loaded.seconds)}", "dim")


def _loaded_json(version: pb.Version, loaded: Loaded) -> dict[str, Any]:
    return {
        "model": version.manifest.name,
        "digest": version.digest,
        **plain.residence_json(loaded.residence),
        "memory_budget_bytes": loaded.budget_bytes,
        "seconds": round(loaded.seconds, 3),
    }


def unload(
    model: ModelArgument,
    worker: WorkerOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a model's engine once its sequences are done: by default on every worker that has it."""
    there = workers.chosen(worker)
    seen = asyncio.run(workers.look(there))
    digest = _named(model, seen) or with_modelstore(None, target, lambda m: resolve(m, model)).digest
    here = seen.of(digest)
    if not here:
        asked = ", ".join(each.name for each in there if each not in seen.silent) or "any worker"
        silent = f"; {', '.join(each.name for each in seen.silent)} did not answer" if seen.silent else ""
        raise CliError(f"{model} ({short(digest)}) is not resident on {asked}{silent}")
    ends = asyncio.run(_unload_all(here, quiet=as_json))
    good = [residence for residence, failure in zip(here, ends, strict=True) if failure is None]
    if as_json:
        plain.print_json(
            [
                {
                    "model": each.model.name,
                    "digest": digest,
                    "worker": each.worker.name,
                    "endpoint": each.worker.target,
                    "freed_bytes": each.model.memory_bytes,
                }
                for each in good
            ]
        )
    else:
        for each in good:
            freed = f": {size(each.model.memory_bytes)} free again" if each.model.memory_bytes else ""
            out.print(f"{each.model.name}@{short(digest)} left {each.worker.name}{freed}", soft_wrap=True)
    _raise_first([failure for failure in ends if failure is not None])


def _named(model: str, seen: workers.Seen) -> str:
    """The digest of a resident version that `NAME@DIGEST` begins: the store may have forgotten it already."""
    try:
        wanted = parse_model(model_reference(model))
    except ValueError as error:
        raise CliError(f"{model}: {error}", status=2) from None
    if wanted.digest_prefix is None:
        return ""
    found = {
        each.model.version
        for each in seen.residences
        if each.model.name == wanted.name and each.model.version.startswith(wanted.digest_prefix)
    }
    return found.pop() if len(found) == 1 else ""


async def _unload_all(here: Sequence[Residence], *, quiet: bool) -> list[CliError | None]:
    for each in here:
        if each.model.running and not quiet:
            line = f"{each.worker.name}: waiting for {each.model.running} running sequences …"
            err.print(line, style="dim", soft_wrap=True)
    return list(await asyncio.gather(*(_unload(each) for each in here)))


async def _unload(residence: Residence) -> CliError | None:
    try:
        await workers.unload(residence.worker, residence.model.version)
    except CallError as error:
        return CliError(workers.explain(residence.worker, error))
    return None


def _raise_first(failures: Sequence[CliError]) -> None:
    """End the command with what failed, all of it in one line."""
    if failures:
        raise CliError("; ".join(map(str, failures)))
