"""What a policy is: it hears of requests and workers, and says who goes where.

All policies get the same news at the same times: arrivals at once, load reports and the ends of streams
after the mesh's latency. None gets to know how long an answer will be. Times are seconds from the
beginning of the run; requests go by their number, workers by their index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from services.batcher.core.messages import LoadReport, Request, Usage


class Send(NamedTuple):
    """This request goes to this worker now."""

    number: int
    worker: int


class Refuse(NamedTuple):
    """This request is answered with an error."""

    number: int
    reason: str


Decision = Send | Refuse
Decisions = Sequence[Decision]


class Policy(Protocol):
    """One way to decide. Whatever happens, it may decide about any request that waits."""

    wants_heartbeats: bool
    """Whether reports that follow no change are of use to it."""

    @property
    def waiting(self) -> int:
        """Requests that it holds back."""
        ...

    def arrived(self, number: int, request: Request, now: float) -> Decisions: ...

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        """A report of a worker came in. At time 0, before any arrival, one of each."""
        ...

    def first_token(self, number: int, now: float) -> Decisions: ...

    def ended(self, number: int, usage: Usage, now: float) -> Decisions: ...

    def next_wake(self) -> float | None:
        """When it wants `wake`; None: not before the next event."""
        ...

    def wake(self, now: float) -> Decisions: ...


class Immediate:
    """A policy that sends each request on at once, knowing what it sent: the base of all but ours."""

    wants_heartbeats = False
    waiting = 0

    def __init__(self, workers: int) -> None:
        self.inflight = [0] * workers
        """Requests sent to each worker that have not ended."""
        self.sent_to: dict[int, int] = {}

    def choose(self, request: Request, now: float) -> int:
        """The worker for it."""
        raise TypeError(f"{type(self).__name__} is no policy by itself")

    def arrived(self, number: int, request: Request, now: float) -> Decisions:
        worker = self.choose(request, now)
        self.inflight[worker] += 1
        self.sent_to[number] = worker
        self.sent(number, request, worker)
        return (Send(number, worker),)

    def sent(self, number: int, request: Request, worker: int) -> None:
        """Book what was chosen."""

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        return ()

    def first_token(self, number: int, now: float) -> Decisions:
        return ()

    def ended(self, number: int, usage: Usage, now: float) -> Decisions:
        self.inflight[self.sent_to.pop(number)] -= 1
        return ()

    def next_wake(self) -> float | None:
        return None

    def wake(self, now: float) -> Decisions:
        return ()
