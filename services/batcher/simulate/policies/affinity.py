"""Prefix affinity alone: the worker with the longest match, whatever its load."""

from __future__ import annotations

from services.batcher.core.messages import LoadReport, Request
from services.batcher.simulate.policies.base import Decisions, Immediate
from services.batcher.simulate.policies.prefixes import ReportedIndex


class PrefixOnly(Immediate):
    """The best match; among equals, and without any, the fewest requests in flight."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._index = ReportedIndex(workers)

    def choose(self, request: Request, now: float) -> int:
        matches = self._index.matches(request.prefix)
        return min(range(len(matches)), key=lambda worker: (-matches[worker], self.inflight[worker]))

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        self._index.learn(worker, report)
        return ()
