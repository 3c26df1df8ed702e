"""Prompts of a wanted length, of text or of token ids, that are equal exactly where they should be.

A prompt is a row of parts; a part is a key and a length, and the same key always gives the same words.
So requests that name the same keys share a prefix, and requests with keys of their own share none that
a prefix cache could use. A word here is one token in the usual byte-pair vocabularies; what a model's
template adds is measured with two probes and taken off, and the answer's usage says what it came to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORDS_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out
so up said what its about than into them can only other time new some could these two may first then
do any like my now over such our man me even most made after also did many off before must well back
through years much where your way down should because long each just state those people too how
little good world make very year still see own work men day get here old life both between being
under three never know same last another while us might great go since against right came take used
few states home during without again place around however found part thought
"""
WORDS = tuple(WORDS_TEXT.split())
"""One token each, with the space before it, in the usual vocabularies."""
PROBE_WORDS = (16, 80)
"""Lengths of the two prompts that a calibration needs."""
SPECIAL_IDS_MAX = 256
"""Low ids are often special tokens or single bytes; random ids are drawn above them."""


@dataclass(frozen=True, slots=True)
class Part:
    """`tokens` tokens that follow from `key` alone."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a workload."""

    parts: tuple[Part, ...]
    output_tokens: int
    at_s: float = 0.0
    """When it is due, from the beginning; only an open loop heeds it."""

    @property
    def prompt_tokens(self) -> int:
        """The length asked for."""
        return sum(part.tokens for part in self.parts)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a text of `n` words costs a model: `overhead + n * per_word` tokens."""

    overhead: float = 0.0
    per_word: float = 1.0

    @classmethod
    def fit(cls, tokens: tuple[int, int]) -> Calibration:
        """From the tokens that prompts of PROBE_WORDS words came to. Raises ValueError for nonsense."""
        few, many = PROBE_WORDS
        per_word = (tokens[1] - tokens[0]) / (many - few)
        if per_word <= 0:
            raise ValueError(f"prompts of {few} and {many} words came to {tokens[0]} and {tokens[1]} tokens")
        # Words differ in length, so two probes may seem to say that a prompt of none has less than nothing.
        return cls(max(0.0, tokens[0] - few * per_word), per_word)

    def words(self, tokens: int) -> int:
        """Words of a part; at least one."""
        return max(1, round(tokens / self.per_word))

    def least_tokens(self) -> int:
        """The shortest prompt that there is: one word."""
        return round(self.overhead + self.per_word)


def text(item: Item, seed: int, calibration: Calibration) -> str:
    """The prompt as text; the template's tokens are taken off its end, at least one word stays."""
    words: list[str] = []
    for part in item.parts:
        words += random.Random(f"{seed}/{part.key}").choices(WORDS, k=calibration.words(part.tokens))
    keep = round((item.prompt_tokens - calibration.overhead) / calibration.per_word)
    return " " + " ".join(words[: max(1, keep)])


def probe_text(words: int, seed: int) -> str:
    """A prompt of so many words, for a calibration."""
    return text(Item((Part(f"probe-{words}", words),), 1), seed, Calibration())


def token_ids(item: Item, seed: int, vocab_size: int) -> list[int]:
    """The prompt as random token ids below `vocab_size`."""
    low = min(SPECIAL_IDS_MAX, vocab_size // 2)
    ids: list[int] = []
    for part in item.parts:
        ids += random.Random(f"{seed}/{part.key}").choices(range(low, vocab_size), k=part.tokens)
    return ids
