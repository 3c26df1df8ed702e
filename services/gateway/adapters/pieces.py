"""How each token of a tokenizer is spelled in bytes, read from its decoder.

Byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM) spell every byte as one printable character;
byte-fallback ones (Llama 2, Mistral, Gemma) spell text as itself, a space as U+2581 and odd bytes as
`<0xE2>`. Any other decoder has no table: its tokens must be decoded together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces(dict[int, bytes]):
    """Spellings by token id, filled at first use, so at most one entry for each known id."""

    def __init__(self, tokenizer: Tokenizer, spell: Callable[[str], bytes], hidden: frozenset[int]) -> None:
        super().__init__()
        self._id_to_token = tokenizer.id_to_token
        self._spell = spell
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden else self._id_to_token(token_id)
        if token is None:
            return b""
        spelling = self[token_id] = self._spell(token)
        return spelling


class Spelling:
    """A tokenizer's way of spelling. `by_bytes` is False when only it can join its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        spell, self.strips_first_space = _read_decoder(tokenizer)
        self.by_bytes = spell is not None
        self.all_pieces = Pieces(tokenizer, spell or str.encode, frozenset())
        self.plain_pieces = Pieces(tokenizer, spell or str.encode, self.special_ids)


def _read_decoder(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """(how one token is spelled, whether the text's first space is not part of it)."""
    if tokenizer.decoder is None:
        return None, False
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level, False
    replacements: list[tuple[str, str]] = []
    byte_fallback = strips = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                strips = strips or step.get("prepend_scheme") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                continue
            case _:
                return None, False
    return _word_pieces(replacements, byte_fallback), strips


def _word_pieces(replacements: list[tuple[str, str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def spell(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return spell


def _byte_alphabet() -> Mapping[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        # An added token that holds characters outside the alphabet stands for itself.
        return token.encode()
