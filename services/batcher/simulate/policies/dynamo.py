"""A cost function in the manner of NVIDIA Dynamo's KV router, at temperature 0.

    cost = weight * max(0, (active prefill tokens + prompt) / block - cached blocks) + decode blocks

Active prefill tokens are the uncached prompt tokens of requests sent there that have no first token yet;
decode blocks are the distinct prompt blocks of the requests there, this one's among them (output blocks
are not tracked). A request is held, first come first served, while every worker has more active prefill
tokens than `QUEUE_THRESHOLD` steps hold. Defaults and sources are in docs/performance/simulator.md.
"""

from __future__ import annotations

from collections import deque
from random import Random

from services.batcher.core.messages import LoadReport, Request, Usage
from services.batcher.simulate.kv import PAGE_TOKENS
from services.batcher.simulate.policies.base import Decisions, Immediate, Send
from services.batcher.simulate.policies.prefixes import ReportedIndex

OVERLAP_WEIGHT = 1.0
QUEUE_THRESHOLD = 4.0
"""Of the tokens that one step may hold."""


class _Book:
    """What one worker has to do, as the router counts it."""

    __slots__ = ("active_prefill_tokens", "pages", "single_blocks")

    def __init__(self) -> None:
        self.active_prefill_tokens = 0
        self.pages: dict[int, int] = {}
        """Requests that use a page."""
        self.single_blocks = 0


class Dynamo(Immediate):
    """The least cost; equals are drawn at random. `queue_threshold` 0: nothing is ever held."""

    def __init__(
        self,
        workers: int,
        random: Random,
        *,
        block_tokens: int,
        step_tokens_max: int,
        queue_threshold: float = QUEUE_THRESHOLD,
    ) -> None:
        super().__init__(workers)
        self._random = random
        self._block_tokens = block_tokens
        self._page_blocks = PAGE_TOKENS // block_tokens
        self._held_above = queue_threshold * step_tokens_max
        self._index = ReportedIndex(workers)
        self._books = [_Book() for _ in range(workers)]
        self._held: deque[tuple[int, Request]] = deque()
        self._requests: dict[int, Request] = {}
        self._prefilling: dict[int, int] = {}
        """Active prefill tokens of each request without a first token."""

    @property
    def waiting(self) -> int:  # type: ignore[override]
        return len(self._held)

    def arrived(self, number: int, request: Request, now: float) -> Decisions:
        self._held.append((number, request))
        return self._release(now)

    def choose(self, request: Request, now: float) -> int:
        matches = self._index.matches(request.prefix)
        costs = [self._cost(request, match, book) for match, book in zip(matches, self._books, strict=True)]
        least = min(costs)
        return self._random.choice([worker for worker, cost in enumerate(costs) if cost == least])

    def sent(self, number: int, request: Request, worker: int) -> None:
        match = self._index.matches(request.prefix)[worker]
        book = self._books[worker]
        tokens = max(request.prompt_tokens - match * PAGE_TOKENS, 0)
        self._requests[number] = request
        self._prefilling[number] = tokens
        book.active_prefill_tokens += tokens
        book.single_blocks += self._single_blocks(request)
        for page in request.prefix:
            book.pages[page] = book.pages.get(page, 0) + 1

    def reported(self, worker: int, report: LoadReport, now: float) -> Decisions:
        self._index.learn(worker, report)
        return ()

    def first_token(self, number: int, now: float) -> Decisions:
        self._books[self.sent_to[number]].active_prefill_tokens -= self._prefilling.pop(number, 0)
        return self._release(now)

    def ended(self, number: int, usage: Usage, now: float) -> Decisions:
        book, request = self._books[self.sent_to[number]], self._requests.pop(number)
        book.active_prefill_tokens -= self._prefilling.pop(number, 0)
        book.single_blocks -= self._single_blocks(request)
        for page in request.prefix:
            book.pages[page] -= 1
            if not book.pages[page]:
                del book.pages[page]
        super().ended(number, usage, now)
        return self._release(now)

    def _release(self, now: float) -> Decisions:
        decisions: list[Send] = []
        while self._held and not self._all_busy():
            decisions.extend(super().arrived(*self._held.popleft(), now))  # type: ignore[arg-type]
        return decisions

    def _all_busy(self) -> bool:
        above = self._held_above
        return bool(above) and all(book.active_prefill_tokens > above for book in self._books)

    def _cost(self, request: Request, match: int, book: _Book) -> float:
        prefill = (book.active_prefill_tokens + request.prompt_tokens) / self._block_tokens
        new = sum(page not in book.pages for page in request.prefix)
        decode = (
            (len(book.pages) + new) * self._page_blocks + book.single_blocks + self._single_blocks(request)
        )
        return OVERLAP_WEIGHT * max(prefill - match * self._page_blocks, 0.0) + decode

    def _single_blocks(self, request: Request) -> int:
        """Of the prompt's end, which no page holds."""
        return -(-(request.prompt_tokens - len(request.prefix) * PAGE_TOKENS) // self._block_tokens)
