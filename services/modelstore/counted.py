"""Work in a thread that counts bytes, as a stream of progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from services.modelstore.core.ports import BytesDone, Progress

PROGRESS_INTERVAL_S = 0.1


class _Stopped(Exception):
    """The import that a thread works for has ended."""


async def counted_in_thread(
    stage: str, total: int, work: Callable[[BytesDone], None]
) -> AsyncGenerator[Progress, None]:
    """Run `work` in a thread and report the bytes that it counts; closing stops it at its next count."""
    done = 0
    stopped = False

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if stopped:
            raise _Stopped

    task = asyncio.create_task(asyncio.to_thread(work, on_bytes))
    try:
        while not task.done():
            yield Progress(stage, done, total)
            await asyncio.wait([task], timeout=PROGRESS_INTERVAL_S)
        task.result()
        yield Progress(stage, done, total)
    finally:
        stopped = True
        await asyncio.gather(task, return_exceptions=True)
