"""One load report for all who listen: built once, serialised once, pushed on change and as heartbeat.

Reports leave at least `report_interval_s` and at most `heartbeat_s` apart. A listener that reads
slowly skips to the newest: nothing is queued for it. Nothing is built while nobody listens.

Heartbeats vary by `HEARTBEAT_SPREAD`, so that workers that were started together do not beat together.

Parts of a report are told only when they changed. Who heard the report before gets the changes; who did
not, because it is new or was slow, gets everything: so what a listener puts together has no gap.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from tokenloom.kit.clock import Clock

HEARTBEAT_SPREAD = 0.25
"""A heartbeat comes up to this share of its interval early."""


class Published:
    """A message that is serialised once, for any number of listeners."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        """The bytes, as a message would give them."""
        return self._data


class Numbered(Protocol):
    """One report. Numbers grow by one; those of reports that could not be built are skipped."""

    @property
    def number(self) -> int:
        """At least 1."""
        ...

    def changes(self) -> Published:
        """For who heard the report before this one."""
        ...

    def everything(self) -> Published:
        """For who did not. Asked for only while this is the newest report."""
        ...


class Publisher:
    """Pushes what `build` makes to every listener."""

    def __init__(
        self, build: Callable[[], Numbered], clock: Clock, *, report_interval_s: float, heartbeat_s: float
    ) -> None:
        self._build = build
        self._clock = clock
        self._interval_s = report_interval_s
        self._heartbeat_s = heartbeat_s
        self._latest: Numbered | None = None
        self._built_s = 0.0
        self._listeners: set[asyncio.Event] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._early = False
        """Whether the timer is set for a change, and not for the next heartbeat."""
        self._closed = False

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    def changed(self) -> None:
        """Something that a report says is different now."""
        if self._listeners and not self._early and not self._closed:
            self._early = True
            self._arm(self._due_in_s())

    async def listen(self) -> AsyncGenerator[Published, None]:
        """The present state at once, then every report that is pushed; ends with `close`."""
        news = asyncio.Event()
        heard = -1
        self._listeners.add(news)
        try:
            if self._latest is None or self._due_in_s() <= 0:
                self._publish()
            else:
                news.set()
                if self._timer is None:
                    self._arm(self._heartbeat_s)
            while True:
                await news.wait()
                if self._closed:
                    return
                news.clear()
                report = self._latest
                assert report is not None
                follows, heard = report.number == heard + 1, report.number
                yield report.changes() if follows else report.everything()
        finally:
            self._listeners.discard(news)
            if not self._listeners:
                self._disarm()

    async def close(self) -> None:
        """Push no more, and let every listener end."""
        self._closed = True
        for news in self._listeners:
            news.set()
        self._disarm()

    def _due_in_s(self) -> float:
        return self._built_s + self._interval_s - self._clock.monotonic()

    def _publish(self) -> None:
        # Armed first: a build that fails is logged by the event loop, and the next one is tried.
        self._early = False
        self._arm(self._heartbeat_s * (1 - random.uniform(0, HEARTBEAT_SPREAD)))
        self._built_s = self._clock.monotonic()
        self._latest = self._build()
        for news in self._listeners:
            news.set()

    def _arm(self, in_s: float) -> None:
        """Publish after `in_s`, by a bare timer: a task that waits would cost as much as the report."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(in_s, 0.0), self._publish)

    def _disarm(self) -> None:
        self._early = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
