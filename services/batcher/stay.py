"""One request's stay, between its ext_proc stream and the driver: made at arrival, decided once."""

from __future__ import annotations

import asyncio

from services.batcher.core.messages import Dispatch, Reject, Request

Decision = Dispatch | Reject


class Stay:
    """What the stream waits for. `decision` stays None when the caller leaves first."""

    __slots__ = ("_future", "arrived_ns", "decided_ns", "decision", "pick_begun_ns", "request", "ticket")

    def __init__(self, ticket: int, request: Request, arrived_ns: int) -> None:
        self.ticket = ticket
        self.request = request
        self.decision: Decision | None = None
        self.arrived_ns = arrived_ns
        """Epoch nanoseconds, as the next two."""
        self.pick_begun_ns = arrived_ns
        self.decided_ns = arrived_ns
        self._future: asyncio.Future[None] | None = None

    def decide(self, decision: Decision, pick_begun_ns: int, decided_ns: int) -> None:
        """The scheduler answered. Wakes whoever waits."""
        self.decision = decision
        self.pick_begun_ns = pick_begun_ns
        self.decided_ns = decided_ns
        self.wake()

    def wake(self) -> None:
        """End `wait`, decided or not."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> Decision | None:
        """The decision, or None when `wake` was called before there was one."""
        if self.decision is None:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        return self.decision
