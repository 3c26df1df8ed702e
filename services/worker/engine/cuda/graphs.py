"""CUDA graphs of decode steps: captured once for each of a few sizes, replayed for every smaller batch.

A graph feeds on the tokens of the step before, runs the model and draws greedily; whoever samples draws
again from its logits. Rows beyond a batch are padding: they write nothing and see nothing. All graphs
share one memory pool, so the largest, captured first, decides what they take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FINE, MIDDLE = 64, 256
FINE_STEP, MIDDLE_STEP, COARSE_STEP = 8, 16, 32
CAPTURE_MAX_S = 60.0
"""No further graph is begun after this; sizes without one are computed eagerly."""
WARM_UPS = 2

Empty = Callable[[int], None]
"""Puts padding rows, so many, where the inputs of a graph of this size are."""
Body = Callable[[int], Tensor]
"""Computes a decode step of so many rows from the inputs' places; returns its logits."""


@dataclass(frozen=True, slots=True)
class Graph:
    """One size."""

    rows: int
    logits: Tensor
    """[rows, vocabulary]; overwritten by the next replay."""
    replay: Callable[[], None]


def sizes(sequences_max: int) -> list[int]:
    """Rows of the graphs, rising; the last is `sequences_max`. Padding is at most about a quarter."""
    steps = [
        *(1, 2, 4),
        *range(FINE_STEP, FINE + 1, FINE_STEP),
        *range(FINE + MIDDLE_STEP, MIDDLE + 1, MIDDLE_STEP),
        *range(MIDDLE + COARSE_STEP, sequences_max + 1, COARSE_STEP),
    ]
    return [size for size in steps if size < sequences_max] + [sequences_max]


class Graphs:
    """Those of one model."""

    def __init__(self) -> None:
        self._by_size: dict[int, Graph] = {}
        self._for: list[Graph | None] = []

    def capture(self, sequences_max: int, empty: Empty, body: Body) -> None:
        """Largest first. A model that cannot be captured runs without graphs."""
        began_s, pool = time.monotonic(), torch.cuda.graph_pool_handle()
        free_bytes = torch.cuda.mem_get_info()[0]
        try:
            for rows in reversed(sizes(sequences_max)):
                if time.monotonic() - began_s > CAPTURE_MAX_S:
                    print(
                        f"graphs: none below {min(self._by_size, default=0)} rows, time is up",
                        file=sys.stderr,
                    )
                    break
                self._by_size[rows] = _captured(rows, empty, body, pool)
        except RuntimeError as error:
            print(f"graphs: this model cannot be captured: {error}", file=sys.stderr)
            self._by_size.clear()
        torch.cuda.synchronize()
        self._for = table(self._by_size)
        taken = (free_bytes - torch.cuda.mem_get_info()[0]) / (1 << 30)
        took_s = time.monotonic() - began_s
        print(f"graphs: {len(self._by_size)} sizes in {took_s:.1f} s, {taken:.2f} GiB", file=sys.stderr)

    def of(self, rows: int) -> Graph | None:
        """The smallest that holds so many rows."""
        return self._for[rows] if rows < len(self._for) else None


def _captured(rows: int, empty: Empty, body: Body, pool: Any) -> Graph:
    empty(rows)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            body(rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = body(rows)
    return Graph(rows, logits, graph.replay)


def table(by_size: dict[int, Graph]) -> list[Graph | None]:
    """By the number of rows: the smallest graph that holds them; empty without graphs."""
    known = sorted(by_size)
    if not known:
        return []
    found: list[Graph | None] = [None]
    for rows in known:
        found += [by_size[rows]] * (rows - len(found) + 1)
    return found
