"""Work in a thread that counts bytes, as a stream of progress; and how often progress is told."""

from __future__ import annotations

import asyncio
import time
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


class Pace:
    """Lets a stage's first and last progress through, and of the others one each PROGRESS_INTERVAL_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._last_s = 0.0

    def lets(self, progress: Progress) -> bool:
        now_s = self._clock()
        whole = 0 < progress.total_bytes == progress.done_bytes
        if progress.stage == self._stage and not whole and now_s - self._last_s < PROGRESS_INTERVAL_S:
            return False
        self._stage, self._last_s = progress.stage, now_s
        return True
