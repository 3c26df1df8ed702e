"""What is known of one output: the tokens so far, and how often it was sent.

The journal is what makes re-sending and resuming one thing: an attempt always begins after the
tokens that the journal holds, and a token enters it exactly once, in order.
"""

from __future__ import annotations

from collections.abc import Sequence


class TokenGap(Exception):
    """A worker skipped positions: accepting its tokens would lose some."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"the worker sent token {got} where token {expected} was next")
        self.expected = expected
        self.got = got


class Journal:
    """One output's tokens and attempts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.attempts = 0
        """Calls made for this output."""
        self.resumes = 0
        """Attempts that began after tokens."""
        self.broken = False
        """An attempt ended after a worker had begun: the mesh owes this request its rest."""
        self.fruitless = 0
        """Attempts in a row that added no token."""
        self.breaks = 0
        """Of those, the ones that ended after a worker had begun."""

    def begin_attempt(self) -> None:
        """A call is made now."""
        self.attempts += 1
        self.fruitless += 1
        if self.tokens:
            self.resumes += 1

    def accept(self, index: int, ids: Sequence[int]) -> tuple[int, Sequence[int]]:
        """(how many of `ids` were known already, the new ones). `index` is the position of ids[0].

        Raises TokenGap when positions are missing before `index`.
        """
        known = len(self.tokens) - index
        if known < 0:
            raise TokenGap(len(self.tokens), index)
        new = ids[known:] if known else ids
        if new:
            self.tokens += new
            self.fruitless = self.breaks = 0
        return known, new

    def begun_and_broken(self) -> None:
        """The attempt ended after a worker had begun with it."""
        self.broken = True
        self.breaks += 1
