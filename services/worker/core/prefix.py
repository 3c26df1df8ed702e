"""What a full block of the KV cache holds: its tokens, and all tokens before them.

Keys are chained hashes, BLAKE2b with an 8-byte digest over the parent's key and the block's ids as
little-endian uint32: the chain of `tokenloom.contract.prefix`, so that gateway, batcher and engine name
the same prefix alike. Eight bytes are a name and no proof: `same` compares the tokens themselves.

Every `wire_stride`-th block of a chain has a name that others know, one for each 512 tokens. The end of a
chain is evicted before its beginning, so such a block stands for all blocks before it (but for a while
when one of those was evicted and a sequence holds a copy of it, which takes its place afterwards).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenloom.contract.prefix import BLOCK_TOKENS, WIRE_STRIDE

KEY_BYTES = 8


def wire_stride(block_tokens: int) -> int:
    """Blocks from one name that others know to the next; 0: they know none, for they hash other blocks."""
    return WIRE_STRIDE if block_tokens == BLOCK_TOKENS else 0


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """One block in its chain. A chain begins with `root`, which stands for no tokens."""

    key: bytes
    data: bytes
    """The block's ids as little-endian uint32."""
    parent: Content | None
    depth: int = 0
    """How many blocks the chain has up to here, this one counted."""

    def then(self, tokens: Sequence[int]) -> Content:
        """What the next block holds if it is filled with `tokens`."""
        data = struct.pack(f"<{len(tokens)}I", *tokens)
        key = blake2b(self.key + data, digest_size=KEY_BYTES).digest()
        return Content(key, data, self, self.depth + 1)


def root(key: bytes) -> Content:
    """Where chains begin. Only sequences with the same key ever share blocks."""
    return Content(key, b"", None)


def same(one: Content | None, other: Content | None) -> bool:
    """Whether both stand for the same tokens after the same root, down to the root.

    Chains that share their objects, as those of found blocks do, are compared up to there only.
    """
    while one is not other:
        if one is None or other is None or one.key != other.key or one.data != other.data:
            return False
        one, other = one.parent, other.parent
    return True
