"""Weighted scorers in the manner of the Gateway API inference extension and of llm-d.

Each worker gets points between 0 and 1 from every scorer; the weighted sum decides, and equals are drawn
at random (max-score-picker). Queue: linear between the longest and the shortest queue of waiting
requests, 1 for all when equal. KV: the free share of the cache. Prefix: the matched share of the
prompt's blocks. Weights and sources are in docs/performance/simulator.md. The originals poll queue and
KV metrics every 50 ms; here they come with the same fresh reports that all policies get.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from services.batcher.core.messages import LoadReport, Request
from services.batcher.simulate.kv import PAGE_TOKENS
from services.batcher.simulate.policies.base import Decisions, Immediate
from services.batcher.simulate.policies.prefixes import GuessedIndex, ReportedIndex


class Weights(NamedTuple):
    """Of the three scorers."""

    queue: float
    kv: float
    prefix: float


GAIE_WEIGHTS = Weights(queue=2, kv=2, prefix=3)
GAIE_BLOCK_TOKENS = 16
GAIE_PREFIX_BLOCKS_MAX = 256
"""Blocks of a prompt that its prefix scorer looks at."""
LLM_D_WEIGHTS = Weights(queue=1, kv=1, prefix=2)


class _Scorers(Immediate):
    """The sum over the scorers; the prefix's part is the subclass's."""

    def __init__(self, workers: int, random: Random, weights: Weights) -> None:
        super().__init__(workers)
        self._random = random
        self._weights = weights
        self._queues = [0] * workers
        self._free_share = [1.0] * workers

    def shares(self, request: Request) -> Sequence[float]:
        """The share of the prompt that each worker should have cached."""
        raise TypeError(f"{type(self).__name__} is no policy by itself")

    def choose(self, request: Request, now: float) -> int:
        weights, queues = self._weights, self._queues
        longest, shortest = max(queues), min(queues)
        best, candidates = -1.0, list[int]()
        for worker, share in enumerate(self.shares(request)):
            queue = (longest - queues[worker]) / (longest - shortest) if longest > shortest else 1.0
            score = weights.queue * queue + weights.kv * self._free_share[worker] + weights.prefix * share
            if score > best:
                best, candidates = score, [worker]
            elif score == best:
                candidates.append(worker)
        return self._random.choice(candidates)

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        model = report.models[0]
        self._queues[worker] = model.waiting
        self._free_share[worker] = model.free_blocks / model.total_blocks
        return ()


class Gaie(_Scorers):
    """The inference extension's default plugins, with its guess of what each worker has cached."""

    def __init__(self, workers: int, random: Random, kv_tokens: int) -> None:
        super().__init__(workers, random, GAIE_WEIGHTS)
        self._index = GuessedIndex(workers, kv_tokens // PAGE_TOKENS)

    def shares(self, request: Request) -> Sequence[float]:
        total = min(request.prompt_tokens // GAIE_BLOCK_TOKENS, GAIE_PREFIX_BLOCKS_MAX)
        if not total:
            return [0.0] * len(self.inflight)
        page_blocks = PAGE_TOKENS // GAIE_BLOCK_TOKENS
        matches = self._index.matches(request.prefix[: GAIE_PREFIX_BLOCKS_MAX // page_blocks])
        return [match * page_blocks / total for match in matches]

    def sent(self, number: int, request: Request, worker: int) -> None:
        self._index.sent(worker, request.prefix[: GAIE_PREFIX_BLOCKS_MAX * GAIE_BLOCK_TOKENS // PAGE_TOKENS])


class LlmD(_Scorers):
    """llm-d's precise prefix scorer: what the workers themselves say that they have cached."""

    def __init__(self, workers: int, random: Random) -> None:
        super().__init__(workers, random, LLM_D_WEIGHTS)
        self._index = ReportedIndex(workers)

    def shares(self, request: Request) -> Sequence[float]:
        pages = max(request.prompt_tokens // PAGE_TOKENS, 1)
        return [match / pages for match in self._index.matches(request.prefix)]

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        self._index.learn(worker, report)
        return super().reported(worker, report, now)
