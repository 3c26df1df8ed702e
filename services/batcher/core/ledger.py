"""The account of every request that is here: waiting in a queue, or placed and holding a lease.

It keeps queues, counters and tenants in step with each request's state, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.batcher.core.entry import Entry
from services.batcher.core.lifecycle import Happening, State
from services.batcher.core.messages import PREFIX_TOKENS, Usage
from services.batcher.core.queue import ModelQueue
from services.batcher.core.tenants import Tenants


@dataclass
class Counters:
    """Since the start.

    arrived = waiting + cancelled + refused + dispatched, and dispatched = leased + completed.
    """

    arrived: int = 0
    dispatched: int = 0
    completed: int = 0
    cancelled: int = 0
    """Left while waiting."""
    served_elsewhere: int = 0
    promoted: int = 0
    """Moved up a band after a long wait."""
    placed_tokens: int = 0
    """Prompt tokens of what was dispatched."""
    matched_tokens: int = 0
    """Those of them that the chosen worker's cache was thought to hold."""
    refused: dict[str, int] = field(default_factory=dict)
    """By reason."""

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def copy(self) -> Counters:
        return replace(self, refused=dict(self.refused))


class Ledger:
    """Who is here, and in which state."""

    def __init__(self, tenants_max: int, weights: Mapping[str, float]) -> None:
        self._tenants_max = tenants_max
        self._weights = weights
        self.entries: dict[int, Entry] = {}
        """All that wait or are placed, by ticket."""
        self.leased: dict[int, Entry] = {}
        """Those placed, oldest first."""
        self.newest: dict[str, Entry] = {}
        """By request id, the stay that began last."""
        self.queues: dict[str, ModelQueue] = {}
        """By model; only those in which somebody waits or runs outlive `tidy`."""
        self.tenants = Tenants(tenants_max, weights)
        self.counters = Counters()

    def waited_for(self) -> int:
        """Models that somebody waits for."""
        return sum(1 for queue in self.queues.values() if queue)

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
            queue = self.queues[request.model] = ModelQueue(request.model, self._weights, self._tenants_max)
        queue.push(entry)
        self.entries[entry.ticket] = self.newest[request.request_id] = entry
        self.tenants.queued(request.tenant)

    def place(self, entry: Entry, lease_id: str, now: float) -> None:
        """It goes to a worker."""
        entry.move(Happening.PLACED)
        queue = self.queues[entry.request.model]
        queue.remove(entry)
        queue.note_placed(now)
        queue.placed(entry, entry.flow.expected_cost(entry.uncached_tokens, entry.request.max_new_tokens))
        entry.lease_id = lease_id
        entry.leased_at = now
        self.leased[entry.ticket] = entry
        self.tenants.placed(entry.request.tenant)
        self.counters.dispatched += 1
        self.counters.placed_tokens += entry.request.prompt_tokens
        self.counters.matched_tokens += min(entry.matched * PREFIX_TOKENS, entry.request.prompt_tokens)

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
        queue = self.queues[entry.request.model]
        # Given back first: for a moment both would count, and a counter never falls.
        entry.flow.lead(-entry.cost)
        entry.cost = 0.0
        if usage is not None:
            entry.flow.note_output(usage.completion_tokens)
            entry.flow.serve(usage.prompt_tokens - usage.cached_prompt_tokens, usage.completion_tokens)
        queue.ended(entry)
        self._forget(entry)
        self.tenants.ended(entry.request.tenant, usage)
        self.counters.completed += 1

    def tidy(self, queue: ModelQueue) -> bool:
        """Whether nobody waits in the queue. It is dropped when nobody runs either."""
        if queue:
            return False
        queue.watched_until = None
        queue.stop_aging()
        if not queue.leases:
            self.queues.pop(queue.model, None)
        return True

    def _unqueue(self, entry: Entry) -> None:
        queue = self.queues[entry.request.model]
        queue.remove(entry)
        queue.let_go(entry)
        self.tenants.left(entry.request.tenant)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.ticket]
        if self.newest.get(entry.request.request_id) is entry:
            del self.newest[entry.request.request_id]
