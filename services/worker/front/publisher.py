"""One load report for all who listen: built once, serialised once, pushed on change and as heartbeat.

Reports leave at least `report_interval_s` and at most `heartbeat_s` apart. A listener that reads
slowly skips to the newest: nothing is queued for it. Nothing is built while nobody listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tokenloom.kit.clock import Clock
from tokenloom.kit.logs import get_logger

log = get_logger(__name__)


class Published:
    """A message that is serialised once, for any number of listeners."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        """The bytes, as a message would give them."""
        return self._data


class Publisher:
    """Pushes what `build` makes to every listener."""

    def __init__(
        self, build: Callable[[], bytes], clock: Clock, *, report_interval_s: float, heartbeat_s: float
    ) -> None:
        self._build = build
        self._clock = clock
        self._interval_s = report_interval_s
        self._heartbeat_s = heartbeat_s
        self._latest: Published | None = None
        self._built_s = 0.0
        self._changed = asyncio.Event()
        self._listeners: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    def changed(self) -> None:
        """Something that a report says is different now."""
        self._changed.set()

    async def listen(self) -> AsyncGenerator[Published, None]:
        """The present state at once, then every report that is pushed; ends with `close`."""
        news = asyncio.Event()
        self._listeners.add(news)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="load reports")
            self._task.add_done_callback(_say_if_failed)
        try:
            if self._latest is None or self._due_in_s() <= 0:
                self._publish()
            else:
                news.set()
            while True:
                await news.wait()
                if self._closed:
                    return
                news.clear()
                assert self._latest is not None
                yield self._latest
        finally:
            self._listeners.discard(news)
            if not self._listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    async def close(self) -> None:
        """Push no more, and let every listener end."""
        self._closed = True
        for news in self._listeners:
            news.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _due_in_s(self) -> float:
        return self._built_s + self._interval_s - self._clock.monotonic()

    def _publish(self) -> None:
        self._changed.clear()
        self._latest = Published(self._build())
        self._built_s = self._clock.monotonic()
        for news in self._listeners:
            news.set()

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._changed.wait(), self._heartbeat_s)
            except TimeoutError:
                pass
            due_in_s = self._due_in_s()
            if due_in_s > 0:
                await asyncio.sleep(due_in_s)
            self._publish()


def _say_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("load reports ended by a defect", exc_info=error)
