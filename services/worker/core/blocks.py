"""Blocks of the KV cache: who holds which, which are free, and which can be found by their content.

A block is a number; what memory stands behind it is the engine's business. A block is free when nobody
refers to it, and a reference may be shared. A free block whose content is known stays findable until
`take` hands it out again: it prefers blocks of unknown content, the last released first because its
memory is the warmest, and then the least recently used known one, the end of a chain before its
beginning. Whoever holds a block may write only where its content is not known yet.

Of every `stride`-th block of a chain it is noted when it begins and when it ceases to be findable.

Bound: `total` blocks, ids 0 to total - 1; at most one content is kept for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from services.worker.core.changes import NetChanges
from services.worker.core.prefix import Content, same


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_tokens)


class BlockPool:
    """A fixed number of blocks with reference counts."""

    def __init__(self, total: int, stride: int = 0) -> None:
        """`stride` 0: no changes are noted."""
        if total < 1:
            raise ValueError(f"a pool needs at least one block, not {total}")
        self.total = total
        self._stride = stride
        self._changes: NetChanges[bytes] = NetChanges()
        self._references = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        """Free and of unknown content; the next to take is the last."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Free and findable, the least recently used first."""
        self._contents: dict[int, Content] = {}
        self._found: dict[bytes, int] = {}
        """By key, the one block that stands for it."""

    @property
    def free(self) -> int:
        """Blocks that `take` could hand out now."""
        return len(self._blank) + len(self._idle)

    @property
    def findable(self) -> int:
        """Blocks that `find` could name, held or free."""
        return len(self._found)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys at multiples of `stride` that can be found since the last call, and those no longer."""
        changes = self._changes
        if not changes:
            return [], []
        taken = changes.gained(), changes.lost()
        changes.clear()
        return taken

    def references(self, block: int) -> int:
        """How many holders a block has; 0: free."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """So many free blocks, one reference each. Raises ValueError beyond `free`: ask first."""
        if not 0 <= count <= self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} are free")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to blocks that are held or findable. Raises ValueError for any other."""
        for block in blocks:
            if self._references[block] == 0 and block not in self._idle:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each; the last one frees it. Raises ValueError for a free block.

        `blocks` are in the order of their chain, so that its end is evicted first.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} was released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._set_free(block)

    def note(self, block: int, content: Content) -> Content:
        """A held block's content is known and complete: from now on it may be found.

        Returns what the next block's content is to be chained to: that of the block that stands for
        the key, if it is the same.
        """
        self._contents[block] = content
        twin = self._contents[self._stand(block, content)]
        return twin if same(twin, content) else content

    def find(self, content: Content) -> tuple[int, Content] | None:
        """The block that holds exactly this, with the pool's own object for it."""
        block = self._found.get(content.key)
        if block is None or not same(self._contents[block], content):
            return None
        return block, self._contents[block]

    def _stand(self, block: int, content: Content) -> int:
        """The block that stands for the key: this one, if there was none."""
        standing = self._found.get(content.key)
        if standing is not None:
            return standing
        self._found[content.key] = block
        if self._stride and content.depth % self._stride == 0:
            self._changes.gain(content.key)
        return block

    def _set_free(self, block: int) -> None:
        content = self._contents.get(block)
        if content is None:
            self._blank.append(block)
            return
        twin = self._stand(block, content)
        if twin == block:
            self._idle[block] = None
            return
        # A copy is not kept; the one that is was used just now.
        del self._contents[block]
        self._blank.append(block)
        if twin in self._idle:
            self._idle.move_to_end(twin)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        content = self._contents.pop(block)
        del self._found[content.key]
        if self._stride and content.depth % self._stride == 0:
            self._changes.lose(content.key)
        return block
