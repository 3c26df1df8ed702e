"""Which worker has how much of a prompt: two indexes, one of reports and one of guesses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from services.batcher.core.messages import LoadReport


class ReportedIndex:
    """What the workers say that they have: exact, as late as their reports."""

    def __init__(self, workers: int) -> None:
        self._pages: list[set[int]] = [set() for _ in range(workers)]

    def learn(self, worker: int, report: LoadReport) -> None:
        """Take in the changes of a report."""
        for news in report.news:
            if news.prefix is not None:
                if news.prefix.whole:
                    self._pages[worker].clear()
                self._pages[worker].difference_update(news.prefix.evicted)
                self._pages[worker].update(news.prefix.stored)

    def matches(self, prefix: Sequence[int]) -> list[int]:
        """How many of the first pages each worker has."""
        return [_leading(pages, prefix) for pages in self._pages]


class GuessedIndex:
    """What was sent where, the latest `pages_max` pages of each worker."""

    def __init__(self, workers: int, pages_max: int) -> None:
        self._pages: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(workers)]
        self._pages_max = pages_max

    def sent(self, worker: int, prefix: Sequence[int]) -> None:
        """The worker will have these pages soon."""
        pages = self._pages[worker]
        for page in prefix:
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > self._pages_max:
            pages.popitem(last=False)

    def matches(self, prefix: Sequence[int]) -> list[int]:
        """How many of the first pages each worker should have."""
        return [_leading(pages, prefix) for pages in self._pages]


def _leading(pages: set[int] | OrderedDict[int, None], prefix: Sequence[int]) -> int:
    count = 0
    for page in prefix:
        if page not in pages:
            break
        count += 1
    return count
