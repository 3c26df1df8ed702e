"""How a load is driven: closed loop (so many always in flight) or open loop (at given times).

A closed loop sends the next request when one has ended. An open loop sends each when it is due; beyond
`in_flight_max` it waits, but TTFT counts from when the request was due, so a slow server cannot hide
behind its own slowness.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenloom.bench.prompts import Calibration, Item
from tokenloom.bench.stats import Record, Run

OnEnd = Callable[[Record], None]
"""Told of each request that has ended."""


class RequestFailed(Exception):
    """A request outside a measurement was refused."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class Target(Protocol):
    """Whatever answers prompts."""

    model: str
    """Which model to ask; set once, before anything is counted."""
    calibration: Calibration

    async def models(self) -> list[str]:
        """What there is to ask. Raises RequestFailed."""
        ...

    async def count(self, text: str) -> int:
        """Tokens of a prompt, whatever the server puts around it included. Raises RequestFailed."""
        ...

    async def close(self) -> None:
        """Lets go of the connections."""
        ...

    def prepare(self, item: Item, seed: int) -> Any:
        """The request, ready to send; made before the clock runs."""
        ...

    async def ask(self, request: Any, record: Record) -> None:
        """Sends it and fills the record; failures are noted there. Raises nothing."""
        ...


async def closed(
    target: Target, items: Sequence[Item], concurrency: int, seed: int, on_end: OnEnd
) -> tuple[list[Record], Run]:
    """`concurrency` requests in flight until all were sent."""
    records = [Record(wanted_tokens=item.output_tokens) for item in items]
    rest = iter(zip(items, records, strict=True))

    async def worker() -> None:
        for item, record in rest:
            request = target.prepare(item, seed)
            record.due_s = time.perf_counter()
            await _ask(target, request, record, on_end)

    with _cpu() as cpu_s:
        await asyncio.gather(*(worker() for _ in range(min(concurrency, len(items)))))
    return records, Run(concurrency, cpu_s=cpu_s())


async def opened(
    target: Target,
    items: Sequence[Item],
    in_flight_max: int,
    seed: int,
    on_end: OnEnd,
    rate: float | None = None,
) -> tuple[list[Record], Run]:
    """Each request at its `at_s`; at most `in_flight_max` at once. `rate` is the one asked for, if any."""
    records: list[Record] = []
    places = asyncio.Semaphore(in_flight_max)
    held_back = 0
    free_s = 0.0

    async def send(request: Any, record: Record) -> None:
        try:
            await _ask(target, request, record, on_end)
        finally:
            places.release()

    with _cpu() as cpu_s:
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for item in items:
                record = Record(due_s=began_s + item.at_s, wanted_tokens=item.output_tokens)
                records.append(record)
                request = target.prepare(item, seed)
                await asyncio.sleep(max(0.0, record.due_s - time.perf_counter()))
                if places.locked():
                    await places.acquire()
                    free_s = time.perf_counter()
                else:
                    await places.acquire()
                held_back += record.due_s < free_s
                group.create_task(send(request, record))
    span_s = items[-1].at_s if items else 0.0
    given = (len(items) - 1) / span_s if span_s > 0 else 0.0
    return records, Run(in_flight_max, request_rate=rate or given, held_back=held_back, cpu_s=cpu_s())


async def _ask(target: Target, request: Any, record: Record, on_end: OnEnd) -> None:
    await target.ask(request, record)
    record.ended_s = time.perf_counter()
    if not record.output_tokens:
        record.output_tokens = len(record.pieces_s)
    on_end(record)


class _cpu:
    """CPU seconds of this process in a block, with what is not garbage left out of collections."""

    def __enter__(self) -> Callable[[], float]:
        gc.collect()
        gc.freeze()
        self._began_s = time.process_time()
        self._took_s = 0.0
        return lambda: self._took_s

    def __exit__(self, *_: object) -> None:
        self._took_s = time.process_time() - self._began_s
        gc.unfreeze()
