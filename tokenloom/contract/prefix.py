"""Chained hashes of prompt blocks: equal hashes mean equal prefixes, of equal models and salts.

BLAKE2b with an 8-byte digest over parent hash and the block's ids as little-endian uint32. Workers
hash blocks of 16 tokens; every 32nd hash travels, one for each 512 tokens, and counts there as a
little-endian number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from tokenloom.contract.headers import HASH_BYTES, PREFIX_HASHES_MAX

BLOCK_TOKENS = 16
WIRE_STRIDE = 32


def root_hash(version_digest: str, cache_salt: str) -> bytes:
    """The parent of every first block: prefixes are shared inside one version and one salt."""
    return blake2b(f"{version_digest}\0{cache_salt}".encode(), digest_size=HASH_BYTES).digest()


def block_hashes(token_ids: Sequence[int], root: bytes, block_tokens: int = BLOCK_TOKENS) -> list[bytes]:
    """One hash for each whole block of `token_ids`."""
    hashes: list[bytes] = []
    parent = root
    layout = struct.Struct(f"<{block_tokens}I")
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        data = layout.pack(*token_ids[start : start + block_tokens])
        parent = blake2b(parent + data, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def numbers(hashes: Sequence[bytes]) -> tuple[int, ...]:
    """Hashes as they travel."""
    return struct.unpack(f"<{len(hashes)}Q", b"".join(hashes))


def wire_hashes(hashes: Sequence[bytes]) -> tuple[int, ...]:
    """Every 32nd hash, at most `PREFIX_HASHES_MAX`."""
    return numbers(hashes[WIRE_STRIDE - 1 :: WIRE_STRIDE][:PREFIX_HASHES_MAX])
