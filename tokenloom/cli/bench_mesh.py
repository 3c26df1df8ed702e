"""`tokenloom bench mesh`: a load on a public port, level after level.

Before the first level two short prompts are counted, so that prompts can be made to measure whatever
template the server puts around them. Every level has words of its own, so that a prefix cache helps
only where equal prefixes were asked for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tokenloom.bench import prompts, schedule, workload
from tokenloom.bench.prompts import Calibration, Item
from tokenloom.bench.report import Prefix, compare
from tokenloom.bench.stats import Level, Objectives, Record, level
from tokenloom.bench.workload import SEED_STEP, Lengths
from tokenloom.cli import bench_load
from tokenloom.cli.bench_grpc import GrpcTarget
from tokenloom.cli.bench_http import Endpoint, HttpTarget
from tokenloom.cli.bench_load import OnEnd, RequestFailed, Target
from tokenloom.cli.errors import CliError

WARM_UP_REQUESTS = 4
"""At most so many requests come before each level and are not counted."""
WARM_UP_TOKENS = 16

Protocol_ = Literal["openai", "grpc"]


class Watcher(Protocol):
    """Is shown how it goes."""

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int) -> OnEnd: ...

    def measured(self, level: Level) -> None: ...


@dataclass(frozen=True)
class MeshLoad:
    """What to send where."""

    address: str
    """`http://host:port`."""
    model: str | None = None
    protocol: Protocol_ = "openai"
    endpoint: Endpoint = "chat"
    concurrency: tuple[int, ...] = (1,)
    """Closed loop; empty for an open one."""
    rates: tuple[float, ...] = ()
    """Open loop, requests per second."""
    requests: int | None = None
    lengths: Lengths = field(default_factory=lambda: Lengths(64, 64))
    trace: tuple[Item, ...] = ()
    in_flight_max: int = 1024
    prefix_tokens: int = 0
    seed: int = 0
    objectives: Objectives = field(default_factory=Objectives)
    timeout_s: float = 600.0
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None

    @property
    def spoken(self) -> str:
        """The protocol as reports name it."""
        return "grpc" if self.protocol == "grpc" else f"openai-{self.endpoint}"

    def count(self, concurrency: int) -> int:
        """Requests of a level."""
        return self.requests or max(16, 4 * concurrency)


@dataclass
class Outcome:
    """What was measured."""

    model: str
    calibration: Calibration
    levels: list[Level] = field(default_factory=list)
    prefix: Prefix | None = None


def run(load: MeshLoad, watcher: Watcher) -> Outcome:
    """Raises CliError when nothing can be measured."""
    try:
        with asyncio.Runner(loop_factory=load.loop) as runner:
            return runner.run(_run(load, watcher))
    except RequestFailed as error:
        raise CliError(_explain(error, load.address)) from None


def _explain(error: RequestFailed, address: str) -> str:
    if error.reason == "CONNECT":
        return f"nothing answers at {address}: start a mesh with `tokenloom up`, or name one with --address"
    return str(error)


async def _run(load: MeshLoad, watcher: Watcher) -> Outcome:
    target = _target(load)
    try:
        offered = await target.models()
        target.model = _choose(load.model, offered)
        target.calibration = await _calibrate(target, load, offered)
        outcome = Outcome(target.model, target.calibration)
        if load.prefix_tokens:
            outcome.prefix = await _prefix(target, load, watcher)
            return outcome
        for number, shape in enumerate(_shapes(load)):
            outcome.levels.append(await _level(target, load, shape, load.seed + number * SEED_STEP, watcher))
            watcher.measured(outcome.levels[-1])
        return outcome
    finally:
        await target.close()


def _target(load: MeshLoad) -> Target:
    if load.protocol == "grpc":
        return GrpcTarget(load.address.partition("://")[2], load.endpoint == "completions", load.timeout_s)
    return HttpTarget(load.address, load.endpoint, load.timeout_s)


def _choose(wanted: str | None, offered: Sequence[str]) -> str:
    if wanted is not None:
        return wanted
    if len(offered) != 1:
        raise CliError(f"say which model with --model; there are: {', '.join(offered) or 'none'}")
    return offered[0]


async def _calibrate(target: Target, load: MeshLoad, offered: Sequence[str]) -> Calibration:
    """What a prompt costs beside its words. Raises CliError, RequestFailed."""
    try:
        texts = [prompts.probe_text(words, load.seed) for words in prompts.PROBE_WORDS]
        few, many = [await target.count(text) for text in texts]
    except RequestFailed as error:
        if target.model in offered or error.reason == "CONNECT":
            raise
        raise CliError(f"{error}; there are: {', '.join(offered) or 'none'}") from None
    try:
        calibration = Calibration.fit((few, many))
    except ValueError as error:
        raise CliError(f"the server's usage cannot be right: {error}") from None
    least = calibration.least_tokens()
    if not load.trace and load.lengths.prompt + load.prefix_tokens < least:
        raise CliError(f"--prompt-tokens: the shortest prompt of this model has {least} tokens", status=2)
    return calibration


@dataclass(frozen=True)
class _Shape:
    """One level: closed with so many in flight, or open at a rate (None: as the trace says)."""

    concurrency: int | None
    rate: float | None = None

    @property
    def title(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return f"{self.rate:g} requests/s" if self.rate else "as recorded"


def _shapes(load: MeshLoad) -> list[_Shape]:
    if load.rates:
        return [_Shape(None, rate) for rate in load.rates]
    return [_Shape(concurrency) for concurrency in load.concurrency] or [_Shape(None)]


def _items(load: MeshLoad, shape: _Shape, seed: int) -> list[Item]:
    items = list(load.trace)[: load.requests]
    if not items:
        items = workload.fixed("request", load.count(shape.concurrency or 1), load.lengths)
    if shape.rate:
        items = workload.at(items, schedule.poisson(shape.rate, len(items), random.Random(seed)))
    return items


async def _level(target: Target, load: MeshLoad, shape: _Shape, seed: int, watcher: Watcher) -> Level:
    items = _items(load, shape, seed)
    await _warm_up(target, items, shape.concurrency or 1, seed, watcher)
    on_end = watcher.begin(shape.title, len(items))
    if shape.concurrency is not None:
        records, driven = await bench_load.closed(target, items, shape.concurrency, seed, on_end)
    else:
        records, driven = await bench_load.opened(target, items, load.in_flight_max, seed, on_end, shape.rate)
    return level(records, driven, load.objectives)


async def _warm_up(
    target: Target, items: Sequence[Item], concurrency: int, seed: int, watcher: Watcher
) -> None:
    """A few short answers to other prompts of the same length. Raises RequestFailed when all fail."""
    longest = items[0]
    lengths = Lengths(longest.prompt_tokens, min(WARM_UP_TOKENS, longest.output_tokens))
    some = workload.fixed("warm-up", min(WARM_UP_REQUESTS, concurrency), lengths)
    watcher.note("warm-up")
    records, _ = await bench_load.closed(target, some, len(some), seed, lambda _: None)
    if all(record.error for record in records):
        raise RequestFailed(records[0].error, "already the first requests failed; see `tokenloom logs`")


async def _prefix(target: Target, load: MeshLoad, watcher: Watcher) -> Prefix:
    """Cold and warm in turn, one request at a time."""
    pairs = workload.pairs("pair", load.requests or 4, load.prefix_tokens, load.lengths)
    await _warm_up(target, [pairs[0][0]], 1, load.seed, watcher)
    on_end = watcher.begin(f"{load.prefix_tokens} tokens cached", 2 * len(pairs))
    sides: tuple[list[Record], list[Record]] = ([], [])
    for pair in pairs:
        for side, item in zip(sides, pair, strict=True):
            records, _ = await bench_load.closed(target, [item], 1, load.seed, on_end)
            side += records
    try:
        return compare(load.prefix_tokens, *sides)
    except ValueError as error:
        raise CliError(str(error)) from None


def fast_loop(protocol: Protocol_) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The faster loop for sockets; gRPC has a poller of its own."""
    if protocol == "grpc":
        return None
    import uvloop

    return uvloop.new_event_loop
