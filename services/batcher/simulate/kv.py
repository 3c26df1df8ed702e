"""One worker's KV blocks: who holds how many, and which prefixes are found again.

Prefixes are kept in pages, one for each whole 512 tokens of a prompt, named by the numbers of
`Request.prefix`. A page that running sequences use is shared by them and stays; the others stay until
their blocks are needed. They leave in the order in which they were last let go, and a sequence lets its
last page go first: so a page never leaves before the pages that follow it. All other blocks belong to
one sequence each, and only their number is kept. Bound: `total_blocks`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tokenloom.bench.traces import BLOCK_TOKENS

PAGE_TOKENS = BLOCK_TOKENS
"""The unit in which a trace names what it shares."""


class KvCache:
    """Blocks are counted, not placed. Callers take no more than `free`."""

    __slots__ = ("_changes", "_idle", "_page_blocks", "_references", "_used", "total_blocks")

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        """Raises ValueError when a page is no whole number of blocks."""
        if PAGE_TOKENS % block_tokens:
            raise ValueError(
                f"pages of {PAGE_TOKENS} tokens are no whole number of {block_tokens}-token blocks"
            )
        self.total_blocks = total_blocks
        self._page_blocks = PAGE_TOKENS // block_tokens
        self._used = 0
        """Blocks of single sequences and of pages that sequences use."""
        self._references: dict[int, int] = {}
        """Sequences that use a page, by page; 0 for the idle ones."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages that nobody uses, the first to leave first."""
        self._changes: dict[int, bool] = {}
        """Pages that came (True) or went since `changes` was asked last."""

    @property
    def free(self) -> int:
        """Blocks that can be taken, those of idle pages included."""
        return self.total_blocks - self._used

    @property
    def pages(self) -> int:
        """Pages that can be found."""
        return len(self._references)

    def found(self, prefix: Sequence[int], pages_max: int) -> tuple[int, int]:
        """How many of the first pages are here, at most `pages_max`, and how many blocks of them are idle."""
        references, count, idle = self._references, 0, 0
        for page in prefix[:pages_max]:
            users = references.get(page)
            if users is None:
                break
            count += 1
            idle += not users
        return count, idle * self._page_blocks

    def share(self, pages: Sequence[int]) -> None:
        """One more sequence uses these pages, all of which are here."""
        for page in pages:
            self._use(page)

    def take(self, blocks: int) -> None:
        """Blocks for one sequence, at the cost of idle pages."""
        self._used += blocks
        self._evict()

    def give_back(self, blocks: int) -> None:
        """Blocks that one sequence had for itself."""
        self._used -= blocks

    def keep(self, page: int) -> None:
        """A sequence has computed a page in its own blocks: from now on all can find it, and share it.

        If it is here already, that one is used and the sequence's own blocks come free.
        """
        if page in self._references:
            self._use(page)
            self._used -= self._page_blocks
        else:
            self._references[page] = 1
            self._changes[page] = True

    def let_go(self, pages: Sequence[int]) -> None:
        """A sequence does not use these pages any more; they stay findable while there is room."""
        references = self._references
        for page in reversed(pages):
            references[page] -= 1
            if not references[page]:
                self._used -= self._page_blocks
                self._idle[page] = None

    def changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Pages that came and that went since the last call."""
        changes, self._changes = self._changes, {}
        came = tuple(page for page, here in changes.items() if here)
        return came, tuple(page for page, here in changes.items() if not here)

    def _use(self, page: int) -> None:
        users = self._references[page]
        if not users:
            del self._idle[page]
            self._used += self._page_blocks
        self._references[page] = users + 1

    def _evict(self) -> None:
        over = self._used + len(self._idle) * self._page_blocks - self.total_blocks
        while over > 0 and self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._references[page]
            self._changes[page] = False
            over -= self._page_blocks
