"""Tokens that one engine computed, by tenant and band: what fairness between tenants is counted by.

Counted when a report is due and when a sequence ends, never once a token. A prompt counts from the
sequence's first token on. Bound: `PAIRS_MAX` pairs of tenant and band, those that changed last; one that
was forgotten begins at nothing again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from services.worker.front.sequence import Sequence

PAIRS_MAX = 1024


class Served(NamedTuple):
    """One pair's tokens since boot."""

    tenant: str
    priority: int
    prompt_tokens: int
    """Those that no cache held."""
    generated_tokens: int


class ServedTokens:
    """The counts of one engine, over all lives of its process."""

    __slots__ = ("_news", "_pairs")

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[str, int], Served] = OrderedDict()
        """The one that changed longest ago first."""
        self._news: dict[tuple[str, int], None] = {}

    def count(self, sequence: Sequence) -> None:
        """What a sequence took since it was counted last."""
        generated = sequence.received - sequence.counted_tokens
        if not generated:
            return
        computed = 0 if sequence.counted_tokens else sequence.prompt_tokens - sequence.cached_prompt_tokens
        sequence.counted_tokens = sequence.received
        pair = sequence.tenant, sequence.priority
        known = self._pairs.get(pair)
        if known is not None:
            computed += known.prompt_tokens
            generated += known.generated_tokens
        self._pairs[pair] = Served(*pair, computed, generated)
        self._pairs.move_to_end(pair)
        self._news[pair] = None
        if len(self._pairs) > PAIRS_MAX:
            forgotten, _ = self._pairs.popitem(last=False)
            self._news.pop(forgotten, None)

    def take(self) -> list[Served]:
        """Pairs that changed since the last call."""
        if not self._news:
            return []
        pairs, news = self._pairs, self._news
        self._news = {}
        return [pairs[pair] for pair in news]

    def all(self) -> list[Served]:
        """Every pair, as counted last."""
        return list(self._pairs.values())
