"""One request's stay: its state, and the lease it holds. Only the scheduler and the fleet write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.batcher.core.lifecycle import Happening, State, after
from services.batcher.core.messages import Request

if TYPE_CHECKING:
    from services.batcher.core.fleet import Worker


class Entry:
    """A request from its arrival here to the end of its stream."""

    __slots__ = ("entered", "lease_id", "leased_at", "request", "served_by", "state", "ticket", "worker")

    def __init__(self, ticket: int, request: Request, entered: float) -> None:
        self.ticket = ticket
        self.request = request
        self.entered = entered
        self.state = State.WAITING
        self.lease_id = ""
        self.leased_at = 0.0
        self.worker: Worker | None = None
        """Who holds it: the worker picked, or the one that the proxy moved it to."""
        self.served_by = ""
        """The endpoint that answered."""

    def move(self, happening: Happening) -> None:
        """Go to the next state. Raises IllegalTransition."""
        self.state = after(self.state, happening)
