"""Those who ask what becomes of a request: its place while it waits, then how that ended.

Outcomes are pushed; places are read again at intervals, because one dispatch moves everybody behind
it. Bounds: `watchers_max` at once; the interval grows with their number, so that they cost no more
than `POLLS_PER_S_MAX` readings a second together; `REFUSALS_KEPT_MAX` refusals are remembered for those
who ask a moment too late.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable

from services.batcher.core.messages import Dispatch, Reject
from services.batcher.core.snapshot import Place
from tokenloom.kit.errors import CallError

ARRIVAL_WAIT_S = 1.0
"""A request may come this much later than the one who asks for it."""
INTERVAL_MIN_S = 0.1
POLLS_PER_S_MAX = 5_000
RETRY_S = 1.0
REFUSALS_KEPT_MAX = 1_024


class _News:
    """One watcher's mailbox."""

    __slots__ = ("changed", "left", "outcome")

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.outcome: Dispatch | Reject | None = None
        self.left = False


class Watchers:
    """All who watch, by request id."""

    def __init__(self, place_of: Callable[[str], Place | None], watchers_max: int) -> None:
        self._place_of = place_of
        self._watchers_max = watchers_max
        self._by_request: dict[str, set[_News]] = {}
        self._refused: OrderedDict[str, Reject] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def arrived(self, request_id: str) -> None:
        """The request came."""
        for news in self._by_request.get(request_id, ()):
            news.changed.set()

    def decided(self, decision: Dispatch | Reject) -> None:
        """It was dispatched or refused."""
        self._remember(decision)
        for news in self._by_request.get(decision.request.request_id, ()):
            news.outcome = decision
            news.changed.set()

    def left(self, request_id: str) -> None:
        """Its caller left."""
        for news in self._by_request.get(request_id, ()):
            news.left = True
            news.changed.set()

    async def follow(self, request_id: str) -> AsyncGenerator[Place | Dispatch | Reject, None]:
        """Places as they change; a `Dispatch`, a `Reject` or a place without position is the last.

        Raises CallError: REQUEST_NOT_FOUND when it is not here within `ARRIVAL_WAIT_S`, or not any
        more; QUEUE_FULL beyond `watchers_max`.
        """
        if self._count >= self._watchers_max:
            limit = self._watchers_max
            message = f"{limit:,} requests are watched already; try again in {RETRY_S:.0f} s"
            metadata = {"queue": "watchers", "limit": str(limit)}
            raise CallError("QUEUE_FULL", message, metadata=metadata, retry_after_s=RETRY_S)
        news = _News()
        self._by_request.setdefault(request_id, set()).add(news)
        self._count += 1
        try:
            await self._arrival(request_id, news)
            last: Place | None = None
            while not (news.outcome or news.left):
                place = self._place_of(request_id)
                if place is None:
                    break
                if last is None or _differ(place, last):
                    yield place
                    last = place
                if place.position is None:
                    return
                await self._pause(news)
            if news.outcome is None:
                raise _not_found(request_id, "is not here any more: its caller left")
            yield news.outcome
        finally:
            self._count -= 1
            watching = self._by_request[request_id]
            watching.discard(news)
            if not watching:
                del self._by_request[request_id]

    def _remember(self, decision: Dispatch | Reject) -> None:
        request_id = decision.request.request_id
        self._refused.pop(request_id, None)
        if isinstance(decision, Reject):
            self._refused[request_id] = decision
            if len(self._refused) > REFUSALS_KEPT_MAX:
                self._refused.popitem(last=False)

    async def _arrival(self, request_id: str, news: _News) -> None:
        if self._place_of(request_id) is not None:
            return
        news.outcome = self._refused.get(request_id)
        if news.outcome is not None:
            return
        try:
            async with asyncio.timeout(ARRIVAL_WAIT_S):
                await news.changed.wait()
        except TimeoutError:
            why = f"is not here and did not come within {ARRIVAL_WAIT_S:.0f} s"
            raise _not_found(request_id, why) from None

    async def _pause(self, news: _News) -> None:
        news.changed.clear()
        try:
            async with asyncio.timeout(max(INTERVAL_MIN_S, self._count / POLLS_PER_S_MAX)):
                await news.changed.wait()
        except TimeoutError:
            return


def _differ(place: Place, last: Place) -> bool:
    """Everything counts but the time that passes anyway."""
    return place._replace(waited_s=0.0) != last._replace(waited_s=0.0)


def _not_found(request_id: str, why: str) -> CallError:
    message = f"request {request_id!r} {why}"
    return CallError("REQUEST_NOT_FOUND", message, metadata={"request_id": request_id})
