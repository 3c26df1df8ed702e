"""The account of every request that is here: waiting in a queue, or placed and holding a lease.

It keeps queues, counters and tenants in step with each request's state, and decides nothing.
"""

from __future__ import annotations

from services.batcher.core.entry import Entry
from services.batcher.core.lifecycle import Happening, State
from services.batcher.core.messages import Usage
from services.batcher.core.queue import ModelQueue
from services.batcher.core.tenants import Tenants


class Counters:
    """Since the start.

    arrived = waiting + cancelled + refused + dispatched, and dispatched = leased + completed.
    """

    __slots__ = ("arrived", "cancelled", "completed", "dispatched", "refused", "served_elsewhere")

    def __init__(self) -> None:
        self.arrived = 0
        self.dispatched = 0
        self.completed = 0
        self.cancelled = 0
        """Left while waiting."""
        self.served_elsewhere = 0
        self.refused: dict[str, int] = {}
        """By reason."""

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def copy(self) -> Counters:
        twin = Counters()
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.refused = dict(self.refused)
        return twin


class Ledger:
    """Who is here, and in which state."""

    def __init__(self, tenants_max: int) -> None:
        self.entries: dict[int, Entry] = {}
        """All that wait or are placed, by ticket."""
        self.leased: dict[int, Entry] = {}
        """Those placed, oldest first."""
        self.newest: dict[str, Entry] = {}
        """By request id, the stay that began last."""
        self.queues: dict[str, ModelQueue] = {}
        """By model; only those with someone in them outlive `tidy`."""
        self.tenants = Tenants(tenants_max)
        self.counters = Counters()

    def waiting(self) -> list[Entry]:
        """All that wait, in the order of entering."""
        return [entry for entry in self.entries.values() if entry.state is State.WAITING]

    def turn_away(self, entry: Entry, reason: str) -> None:
        """Refused at arrival: it was never here."""
        entry.move(Happening.REFUSED)
        self.counters.refuse(reason)

    def enter(self, entry: Entry) -> None:
        """It waits from now on."""
        request = entry.request
        queue = self.queues.get(request.model)
        if queue is None:
            queue = self.queues[request.model] = ModelQueue(request.model)
        queue.push(entry)
        self.entries[entry.ticket] = self.newest[request.request_id] = entry
        self.tenants.queued(request.tenant)

    def place(self, entry: Entry, lease_id: str, now: float) -> None:
        """It goes to a worker."""
        entry.move(Happening.PLACED)
        queue = self.queues[entry.request.model]
        queue.remove(entry)
        queue.note_placed(now)
        entry.lease_id = lease_id
        entry.leased_at = now
        self.leased[entry.ticket] = entry
        self.tenants.placed(entry.request.tenant)
        self.counters.dispatched += 1

    def refuse(self, entry: Entry, reason: str) -> None:
        """It waited and is refused."""
        entry.move(Happening.REFUSED)
        self._unqueue(entry)
        self.counters.refuse(reason)

    def leave(self, entry: Entry, happening: Happening) -> None:
        """It waited and went by itself."""
        entry.move(happening)
        self._unqueue(entry)
        self.counters.cancelled += 1

    def end(self, entry: Entry, usage: Usage | None) -> None:
        """It was placed and its stream ended."""
        entry.move(Happening.CLOSED)
        del self.leased[entry.ticket]
        self._forget(entry)
        self.tenants.ended(entry.request.tenant, usage)
        self.counters.completed += 1

    def tidy(self, queue: ModelQueue) -> bool:
        """Drop the queue if nobody waits in it; whether it was dropped."""
        if queue:
            return False
        queue.watched = False
        self.queues.pop(queue.model, None)
        return True

    def _unqueue(self, entry: Entry) -> None:
        self.queues[entry.request.model].remove(entry)
        self.tenants.left(entry.request.tenant)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.ticket]
        if self.newest.get(entry.request.request_id) is entry:
            del self.newest[entry.request.request_id]
