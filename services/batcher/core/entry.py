"""One request's stay: its state, its place in the order, and the lease it holds. Only the scheduler and
those it works with write it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.batcher.core.lifecycle import Happening, State, after
from services.batcher.core.messages import PRIORITY_DEFAULT, Request

if TYPE_CHECKING:
    from services.batcher.core.fleet import Worker
    from services.batcher.core.flows import Flow, Key
    from services.batcher.core.pool import Choice


def band_of(priority: int) -> int:
    """The band that a request's priority means."""
    return priority or PRIORITY_DEFAULT


class Entry:
    """A request from its arrival here to the end of its stream."""

    __slots__ = (
        "answered_at",
        "awaits",
        "band",
        "band_since",
        "cost",
        "due",
        "entered",
        "first_there",
        "flow",
        "key",
        "late_at",
        "lease_id",
        "leased_at",
        "look_at",
        "matched",
        "request",
        "served_by",
        "state",
        "ticket",
        "uncached_tokens",
        "worker",
    )

    flow: Flow
    """Whose turn it waits for, and who pays for it. Set when it enters the queue."""

    def __init__(self, ticket: int, request: Request, entered: float) -> None:
        self.ticket = ticket
        self.request = request
        self.entered = entered
        self.state = State.WAITING
        self.band = band_of(request.priority)
        self.band_since = entered
        self.due = due(request)
        self.late_at = late_at(request, self.due)
        self.key: Key = (False, self.due, request.arrival_unix_ms, ticket)
        self.lease_id = ""
        self.leased_at = 0.0
        self.worker: Worker | None = None
        """Who holds it: the worker picked, or the one that the proxy moved it to."""
        self.served_by = ""
        """The endpoint that answered."""
        self.matched = 0
        """Names of its prefix that the worker's cache was thought to hold when it was placed."""
        self.awaits: Choice | None = None
        """The busy worker that it waited for when it was looked at last."""
        self.look_at = 0.0
        """It waits for a busy worker, and a timer looks at it again then; over: it does not."""
        self.uncached_tokens = request.prompt_tokens
        self.first_there = False
        """It found no other prompt ahead of it at its worker."""
        self.answered_at = 0.0
        """When its first token came by; 0: it did not."""
        self.cost = 0.0
        """Charged ahead to its flow."""

    @property
    def late(self) -> bool:
        """Its wish for a first token cannot be met any more: it is best effort inside its tenant's turn."""
        return self.key[0]

    def move(self, happening: Happening) -> None:
        """Go to the next state. Raises IllegalTransition."""
        self.state = after(self.state, happening)


def due(request: Request) -> int:
    """The Unix millisecond by which it wants its first token, as far as it said."""
    deadline = request.deadline_unix_ms or int(request.deadline * 1000)
    if not request.ttft_slo_ms:
        return deadline
    return min(deadline, request.arrival_unix_ms + request.ttft_slo_ms)


def late_at(request: Request, due_unix_ms: int) -> float:
    """When the wish for a first token cannot be met any more, on the core's clock; never without one."""
    if not (request.ttft_slo_ms and request.deadline_unix_ms):
        return float("inf")
    return request.deadline - (request.deadline_unix_ms - due_unix_ms) / 1000
