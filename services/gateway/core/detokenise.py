"""Token ids into text as they come, never half a character.

Most tokenizers spell a token as bytes: then text is those bytes through an incremental UTF-8
decoder, at a constant cost a token. For the few others (`WindowDetokeniser`) only the tokenizer
itself can join pieces, so a short window is decoded again with each token.

Bytes that are no UTF-8 become U+FFFD, one for each maximal bad stretch, exactly as a decode of the
whole output would give. A character that the end of the output cut in two is left out.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

HELD_TOKENS_MAX = 16
"""`WindowDetokeniser` gives up waiting for the rest of a character after this many tokens."""
WINDOW_TOKENS = 6
"""Tokens already emitted that `WindowDetokeniser` keeps as context for the next ones."""

_new_decoder = codecs.getincrementaldecoder("utf-8")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokeniser(Protocol):
    """Turns one output into text."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        ...


class ByteDetokeniser:
    """Detokenises by a table of bytes: `pieces[id]` is empty for tokens that are not shown."""

    def __init__(self, pieces: Mapping[int, bytes], *, strip_first_space: bool = False) -> None:
        self._pieces = pieces
        self._decode = _new_decoder("replace").decode
        self._strip = strip_first_space

    def push(self, ids: Sequence[int]) -> str:
        if len(ids) == 1:
            text = self._decode(self._pieces[ids[0]])
        else:
            pieces = self._pieces
            text = self._decode(b"".join([pieces[i] for i in ids]))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class WindowDetokeniser:
    """Detokenises by the tokenizer's own decoder: what a window of tokens gains by each new one."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """`context` are the prompt's last tokens, which the first ones join."""
        self._decode = decode
        self._window = list(context[-WINDOW_TOKENS:])
        self._before = decode(self._window) if self._window else ""
        self._held = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in ids])

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        self._held += 1
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and self._held < HELD_TOKENS_MAX:
            return ""
        new = text[len(self._before) :]
        self._window = self._window[-WINDOW_TOKENS:]
        self._before = self._decode(self._window)
        self._held = 0
        return new
