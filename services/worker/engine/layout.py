"""How one step's chunks become one flat batch: token ids, positions, cache slots, groups.

Rows of `BlockTables` mirror the block lists of the sequences in the step, so that a step copies only what
is new. Knows numpy, not torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Chunk, Plan
from services.worker.core.sequence import Sequence

Ints = NDArray[np.int64]

PADDING_BLOCKS_MAX = 32
"""Blocks of padding that a group of decodes may hold before a further group is cheaper."""


@dataclass(slots=True)
class _Row:
    number: int
    preemptions: int
    known: int


class BlockTables:
    """Block numbers of the sequences in a step, [2 · sequences_max, blocks of a whole context].

    The step before may be running: a row that it reads changes only after the next but one was laid out.
    """

    def __init__(self, sequences_max: int, blocks_max: int) -> None:
        self.table: Ints = np.zeros((2 * sequences_max, blocks_max), dtype=np.int64)
        self._rows: dict[Sequence, _Row] = {}
        self._free = list(range(2 * sequences_max - 1, -1, -1))
        self._leaving: list[int] = []

    def rows(self, sequences: Seq[Sequence]) -> Ints:
        """Brings the table up to date for exactly these sequences; their rows, in this order."""
        present = set(sequences)
        self._free += self._leaving
        gone = [sequence for sequence in self._rows if sequence not in present]
        self._leaving = [self._rows.pop(sequence).number for sequence in gone]
        return np.array([self._sync(sequence) for sequence in sequences], dtype=np.int64)

    def _sync(self, sequence: Sequence) -> int:
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = _Row(self._free.pop(), sequence.preemptions, 0)
        if row.preemptions != sequence.preemptions:
            row.preemptions, row.known = sequence.preemptions, 0
        if row.known != len(sequence.blocks):
            new = sequence.blocks[row.known :]
            self.table[row.number, row.known : len(sequence.blocks)] = new
            row.known = len(sequence.blocks)
        return row.number


@dataclass(frozen=True, slots=True)
class Span:
    """What attention computes in one call: one token of each of n sequences, or a chunk of one sequence."""

    rows: slice
    """Rows of the flat batch, n · width of them."""
    positions: Ints
    """[n, width], the tokens' positions in their sequences."""
    table: Ints
    """[n, m]: the sequences' blocks; cells past a sequence's last token mean nothing."""
    fresh: bool
    """The chunk begins its sequence, so that nothing has to be read from the cache."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A step as arrays over its tokens."""

    ids: Ints
    positions: Ints
    slots: Ints
    spans: list[Span]
    chunks: Ints
    """[n, 4]: each chunk's first row, rows, position of the first, and row of `tables`."""
    tables: Ints
    """[n, blocks]: each chunk's sequence's blocks; cells past its last token mean nothing."""
    drawing: Ints
    """Rows whose logits are needed, in the order of `sequences`."""
    sequences: list[Sequence]
    """The sequences whose next token is drawn."""
    unknown: list[tuple[int, Chunk]] = field(default_factory=list)
    """Rows whose token the step before draws, and their chunks."""
    decodes: int = 0
    """The first rows are decodes, so many."""

    @property
    def drawn_positions(self) -> Ints:
        """Where the drawn tokens will stand in their sequences, in the order of `sequences`."""
        return self.positions[self.drawing] + 1

    def fill(self) -> None:
        """Puts in the tokens that were not known yet; what ended meanwhile computes something of no use."""
        for row, chunk in self.unknown:
            tokens = chunk.sequence.tokens
            if chunk.start < len(tokens):
                self.ids[row] = tokens[chunk.start]


def flatten(plan: Plan, tables: BlockTables, block_tokens: int) -> Flat:
    """Decodes first, longest first; then the prompt chunks. `drawing` is in the order of the plan."""
    decodes, prompts = plan.chunks[: plan.decodes], plan.chunks[plan.decodes :]
    order = sorted(range(len(decodes)), key=lambda number: -decodes[number].start)
    chunks = [decodes[number] for number in order] + prompts
    rows = tables.rows([chunk.sequence for chunk in chunks])
    ids = [token for chunk in chunks for token in _tokens(chunk)]
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.count for chunk in chunks])
    ends = np.cumsum(counts)
    offsets = np.arange(len(ids)) - np.repeat(ends - counts, counts)
    positions = np.repeat(starts, counts) + offsets
    # A copy: the next step may be laid out while this one runs.
    held = tables.table[rows, : blocks_for(int((starts + counts).max(initial=1)), block_tokens)]
    numbers = np.arange(len(chunks))
    blocks = held[np.repeat(numbers, counts), positions // block_tokens]
    last = ends - 1
    place = np.empty(len(chunks), dtype=np.int64)
    place[[*order, *range(len(decodes), len(chunks))]] = last
    drawing = [number for number, chunk in enumerate(plan.chunks) if chunk.draws]
    return Flat(
        ids=np.array(ids, dtype=np.int64),
        positions=positions,
        slots=blocks * block_tokens + positions % block_tokens,
        spans=[
            *_decode_spans(positions[: len(decodes)], held, block_tokens),
            *_prompt_spans(prompts, positions, held[len(decodes) :], ends[len(decodes) :]),
        ],
        chunks=np.stack([ends - counts, counts, starts, numbers], 1),
        tables=held,
        drawing=place[drawing],
        sequences=[plan.chunks[number].sequence for number in drawing],
        unknown=[(row, chunk) for row, chunk in enumerate(chunks[: plan.decodes]) if chunk.feeds_from >= 0],
        decodes=len(decodes),
    )


def _tokens(chunk: Chunk) -> list[int]:
    if chunk.feeds_from >= 0:
        return [0]
    return chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]


def _decode_spans(positions: Ints, tables: Ints, block_tokens: int) -> list[Span]:
    lengths = [int(position) + 1 for position in positions]
    return [
        Span(cut, positions[cut, None], tables[cut, : blocks_for(lengths[cut.start], block_tokens)], False)
        for cut in group_lengths(lengths, block_tokens)
    ]


def _prompt_spans(chunks: Seq[Chunk], positions: Ints, tables: Ints, ends: Ints) -> list[Span]:
    cuts = [slice(int(end) - chunk.count, int(end)) for chunk, end in zip(chunks, ends, strict=True)]
    return [
        Span(cut, positions[None, cut], tables[number : number + 1], chunk.start == 0)
        for number, (cut, chunk) in enumerate(zip(cuts, chunks, strict=True))
    ]


def group_lengths(lengths: Seq[int], block_tokens: int) -> list[slice]:
    """Cuts falling lengths into runs whose padding to the longest is bounded.

    A run's padding is at most PADDING_BLOCKS_MAX blocks, or a quarter of what it really reads.
    """
    if not lengths:
        return []
    starts, widest, used, padding = [0], blocks_for(lengths[0], block_tokens), 0, 0
    for number, length in enumerate(lengths):
        blocks = blocks_for(length, block_tokens)
        padding += widest - blocks
        if padding > max(PADDING_BLOCKS_MAX, used // 4):
            starts.append(number)
            widest, used, padding = blocks, 0, 0
        used += blocks
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]
