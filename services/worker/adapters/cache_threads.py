"""Threads of the cache's own, so that hashing and a slow disk hold up nobody else.

What runs in a thread cannot be stopped. A caller that is cancelled leaves only when its call has returned:
what the call uses (a file, a lock) is still the caller's to close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

LOCK_POLL_S = 0.1
"""Between two tries for a lock of another process."""

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """At most `threads_max`; they start when they are needed."""

    def __init__(self, threads_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="cache")

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it in a thread and wait for its end, also when cancelled."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        return await ended(call)


async def ended(call: asyncio.Future[R]) -> R:
    """The result of what cannot be stopped; a cancellation is raised once it has ended."""
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        call.exception()
        raise cancelled
    return call.result()


async def until(ready: Callable[[], Awaitable[bool]], idle_max_s: float, sign: Callable[[], object]) -> bool:
    """Ask again and again. False when `sign`, which tells that somebody works, stood still for so long."""
    waited_s, seen = 0.0, sign()
    while not await ready():
        if waited_s >= idle_max_s:
            return False
        await asyncio.sleep(LOCK_POLL_S)
        waited_s += LOCK_POLL_S
        if (now := sign()) != seen:
            waited_s, seen = 0.0, now
    return True
