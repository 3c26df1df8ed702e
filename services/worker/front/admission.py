"""Who may start on one engine now, who waits here, and who is refused.

A request with a lease starts at once or not at all: the batcher gave it a place. One without a lease
waits in a bounded queue, the most urgent and then the oldest first. Nothing here knows the time.

The engine's report of free blocks lags behind what was sent to it. Two lower bounds are always true:
the reported number less the needs of sequences that gave no token yet, and the total less whole
lengths of all sequences (which ignores blocks that they share). The better of them is used.
"""

from __future__ import annotations

from bisect import insort
from enum import Enum

from services.worker.front.sequence import Sequence
from services.worker.protocol import Load, Ready

NO_LOAD = Load(0, 0, 0, 0, 0, 0.0, 0.0)


class Offer(Enum):
    """What becomes of an arrival."""

    START = "start"
    QUEUE = "queue"
    FULL = "full"


def blocks_needed(tokens: int, block_tokens: int) -> int:
    """Blocks to start a sequence of `tokens`: all of them, and one to grow into."""
    return -(-tokens // block_tokens) + 1


class Admission:
    """The sequences of one engine: those it holds, and those that wait for it here."""

    def __init__(self, queue_max: int) -> None:
        self._queue_max = queue_max
        self._ready: Ready | None = None
        self._load = NO_LOAD
        self._active: dict[str, Sequence] = {}
        self._queue: list[tuple[int, int, int, Sequence]] = []
        self._arrivals = 0

    @property
    def active(self) -> dict[str, Sequence]:
        """Sequences that the engine holds, by key."""
        return self._active

    @property
    def load(self) -> Load:
        """The engine's last word about itself."""
        return self._load

    @property
    def queued(self) -> int:
        """Sequences that wait here."""
        return len(self._queue)

    @property
    def queue(self) -> list[Sequence]:
        """Those that wait here, the next first."""
        return [entry[3] for entry in self._queue]

    @property
    def running(self) -> int:
        """Sequences in the engine's batch, as far as it said."""
        return min(self._load.running, len(self._active))

    @property
    def waiting(self) -> int:
        """Sequences that are here or in the engine, and not in its batch yet."""
        return len(self._active) - self.running + len(self._queue)

    def open(self, ready: Ready) -> list[Sequence]:
        """The engine can serve: everyone who may start now."""
        self._ready = ready
        self._load = Load(0, 0, ready.sequences_max, ready.total_blocks, 0, 0.0, 0.0)
        return self.admit()

    def shut(self) -> tuple[list[Sequence], list[Sequence]]:
        """The engine is gone: those that it held, and those that waited here. Nobody may start."""
        held, waiting = list(self._active.values()), [entry[3] for entry in self._queue]
        self._ready = None
        self._load = NO_LOAD
        self._active.clear()
        self._queue.clear()
        return held, waiting

    def offer(self, sequence: Sequence) -> Offer:
        """Place an arrival. On START it counts as held by the engine from now on."""
        if self._fits(sequence) and (sequence.leased or not self._queue):
            self._active[sequence.key] = sequence
            return Offer.START
        if sequence.leased or self._ready is None or len(self._queue) >= self._queue_max:
            return Offer.FULL
        self._arrivals += 1
        # Bands 1 to 4 are strict; the counter keeps the order of equals and spares comparing sequences.
        insort(self._queue, (sequence.priority, sequence.arrival_ms, self._arrivals, sequence))
        return Offer.QUEUE

    def leave(self, key: str) -> bool:
        """A sequence ended or its caller left, wherever it was. True when the engine held it."""
        if self._active.pop(key, None) is not None:
            return True
        self._queue = [entry for entry in self._queue if entry[3].key != key]
        return False

    def settle(self, load: Load) -> None:
        """A step ended: take the engine's new numbers."""
        self._load = load

    def admit(self) -> list[Sequence]:
        """Those of the queue that may start now; they count as held by the engine from now on."""
        admitted: list[Sequence] = []
        while self._queue and self._fits(self._queue[0][3]):
            sequence = self._queue.pop(0)[3]
            self._active[sequence.key] = sequence
            admitted.append(sequence)
        return admitted

    def free_sequences(self) -> int:
        """Places that the next arrival may count on."""
        if self._ready is None:
            return 0
        return max(0, self._ready.sequences_max - len(self._active) - len(self._queue))

    def free_blocks(self) -> int:
        """Blocks that the next arrival may count on."""
        ready = self._ready
        if ready is None:
            return 0
        size = ready.block_tokens
        by_report, by_length = self._load.free_blocks, ready.total_blocks
        for sequence in self._active.values():
            need = -(-sequence.length // size) + 1
            by_length -= need
            if not sequence.received:
                by_report -= need
        return max(0, by_report, by_length)

    def _fits(self, sequence: Sequence) -> bool:
        ready = self._ready
        if ready is None or len(self._active) >= ready.sequences_max:
            return False
        if not self._active:
            # An idle engine takes whatever its whole cache can hold.
            return True
        return blocks_needed(sequence.length, ready.block_tokens) <= self.free_blocks()
