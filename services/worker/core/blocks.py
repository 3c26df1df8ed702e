"""Blocks of the KV cache: who holds which, and which are free.

A block is a number; what memory stands behind it is the engine's business. A block is free when
nobody refers to it, and a reference may be shared, which is what a prefix cache needs: it would keep
released blocks findable by their content until `take` hands them out again. The last block released is
the first handed out, because its memory is the warmest.

Bound: `total` blocks, ids 0 to total - 1.
"""

from __future__ import annotations

from collections.abc import Sequence


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_tokens)


class BlockPool:
    """A fixed number of blocks with reference counts."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a pool needs at least one block, not {total}")
        self.total = total
        self._references = [0] * total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that `take` could hand out now."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many holders a block has; 0: free."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """So many free blocks, one reference each. Raises ValueError beyond `free`: ask first."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to blocks that somebody holds. Raises ValueError for a free one."""
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each; the last one frees it. Raises ValueError for a free block."""
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} was released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
