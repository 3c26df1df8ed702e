"""What a mesh begins with when nobody said which models to load: the first few, as far as they fit.

Whoever starts it is told which are there, which come when they are asked for, and which never can, in the
workers' words. Nothing leaves for another one. Bound: `PRELOAD_MAX_S` a model on each worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenloom.cli import models_workers as workers
from tokenloom.cli.models_workers import Worker
from tokenloom.kit.errors import CallError

PRELOAD_MAX_S = 900.0
NO_ROOM = "MODEL_MEMORY_BUSY"
"""It is loaded later, when another one leaves for it."""


@dataclass(frozen=True)
class Preloaded:
    """What came of it. `resident`: names that a worker has at least."""

    resident: tuple[str, ...]
    failures: tuple[str, ...]
    """A line for each model that a worker cannot load, whoever leaves."""


async def preload(there: Sequence[Worker], first: Mapping[str, str]) -> Preloaded:
    """Load these on all workers, one after the other. `first`: digests by name. Raises nothing."""
    ends = await asyncio.gather(*(_preload(worker, first) for worker in there))
    resident = tuple(name for name in first if any(end[name] is None for end in ends))
    failures = {
        (name, error.message): workers.explain(worker, error)
        for worker, end in reversed([*zip(there, ends, strict=True)])
        for name, error in end.items()
        if error is not None and error.reason != NO_ROOM
    }
    return Preloaded(resident, tuple(failures.values()))


async def _preload(worker: Worker, first: Mapping[str, str]) -> dict[str, CallError | None]:
    """By name, why it was not loaded there; None: it was."""
    ends: dict[str, CallError | None] = {}
    for name, digest in first.items():
        try:
            async with asyncio.timeout(PRELOAD_MAX_S):
                await workers.load(worker, digest, evict=False, tell=lambda _: None)
            ends[name] = None
        except CallError as error:
            ends[name] = error
        except TimeoutError:
            why = f"{name} is still being loaded after {PRELOAD_MAX_S:.0f} s, and goes on"
            ends[name] = CallError("MODEL_NOT_READY", why, metadata={"model": digest})
    return ends
