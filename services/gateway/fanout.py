"""Several outputs of one request as one stream of events, each output at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from services.gateway.core.choice import Event
from services.gateway.runner import Runner

EVENTS_QUEUED_MAX = 64
"""Events that wait for a slow caller; then the outputs wait too."""


async def merged(runners: Sequence[Runner]) -> AsyncGenerator[Event, None]:
    """Every runner's events. The first failure ends all; so does leaving."""
    queue: asyncio.Queue[Event | None] = asyncio.Queue(EVENTS_QUEUED_MAX)

    async def pump(runner: Runner) -> None:
        try:
            async with aclosing(runner.events()) as events:
                async for event in events:
                    await queue.put(event)
        finally:
            # Wakes the reader, unless a full queue does that anyway.
            if not queue.full():
                queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(runner)) for runner in runners]
    try:
        while True:
            for task in tasks:
                if task.done():
                    task.result()
            if queue.empty() and all(task.done() for task in tasks):
                return
            event = await queue.get()
            if event is not None:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
