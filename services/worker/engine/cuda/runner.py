"""Steps on a CUDA device: launched without waiting, one while another computes.

The host sends a step's arrays and enqueues its work; tokens that the step before draws are read where
they are, on the device. Decodes alone replay a graph, everything else is launched operation by
operation. Each step ends with a small copy to pinned memory, which `wait` waits for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Limits, Plan
from services.worker.engine.cuda.cache import CudaCache, CudaStep, Places
from services.worker.engine.cuda.decode import splits_for
from services.worker.engine.cuda.graphs import Graphs
from services.worker.engine.cuda.inputs import ALIGNMENT_BYTES, RING, Arrays, Inputs
from services.worker.engine.cuda.prefill import tile_rows, tiles
from services.worker.engine.history import History
from services.worker.engine.layout import BlockTables, Flat, Ints, flatten
from services.worker.engine.loader import LoadedModel
from services.worker.engine.runner import Batches
from services.worker.engine.sampling import Choice, Drawn, choose

MULTIPROCESSORS_WITHOUT_A_DEVICE = 8
"""For Triton's interpreter."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """A step whose tokens are on their way to the host."""

    choice: Choice
    tokens: Tensor
    """[rows], pinned."""
    arrived: torch.cuda.Event | None

    def wait(self) -> Drawn:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.choice.drawn(self.tokens.tolist())


class CudaRunner:
    """One model on one device, and its KV cache."""

    ahead = True

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self._model, self._device = loaded.model, loaded.device
        self._limits = limits
        self._cache = CudaCache(loaded.shape, loaded.blocks, limits.block_tokens, loaded.dtype, loaded.device)
        self._tile_rows = tile_rows(loaded.shape.head_dim, loaded.dtype)
        self._blocks_max = blocks_for(limits.context_length, limits.block_tokens)
        self._tables = BlockTables(limits.sequences_max, self._blocks_max)
        self._batches = Batches(loaded.device)
        self._inputs = Inputs(_bytes_max(limits, self._blocks_max), loaded.device)
        self._tokens = torch.zeros(limits.sequences_max, dtype=torch.int64, device=loaded.device)
        """Drawn by the step before, in the order of its plan."""
        on_device = loaded.device.type == "cuda"
        self._host = [
            torch.zeros(limits.sequences_max, dtype=torch.int64, pin_memory=on_device) for _ in range(RING)
        ]
        self._turn = 0
        self._graphs = Graphs()
        self._processors = (
            torch.cuda.get_device_properties(loaded.device).multi_processor_count
            if on_device
            else MULTIPROCESSORS_WITHOUT_A_DEVICE
        )

    def prepare(self, plan: Plan) -> Flat:
        return flatten(plan, self._tables, self._limits.block_tokens)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs."""
        if self._device.type == "cuda":
            self._graphs.capture(self._limits.sequences_max, self._empty, self._decode)

    def forget(self) -> None:
        self._batches.forget()

    @torch.inference_mode()
    def launch(self, flat: Flat, histories: Seq[History]) -> _Copied:
        """Where a history looks back, the step before was waited for."""
        graph = self._graphs.of(len(flat.ids)) if _decodes_alone(flat) else None
        if graph is None:
            logits = self._eager(flat)
        else:
            self._inputs.send(self._padded(flat, graph.rows))
            graph.replay()
            logits = graph.logits[: len(flat.sequences)]
        batch = self._batches.of(flat, histories)
        count = len(flat.sequences)
        if graph is not None and batch.simple:
            choice = Choice(self._tokens[:count], batch.histories, None)
        else:
            choice = choose(logits, batch, flat.drawn_positions)
            self._tokens[:count].copy_(choice.tokens)
        return self._copied(choice)

    def _copied(self, choice: Choice) -> _Copied:
        self._turn = (self._turn + 1) % RING
        host = self._host[self._turn][: len(choice.histories)]
        host.copy_(choice.tokens, non_blocking=True)
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return _Copied(choice, host, arrived)

    def _eager(self, flat: Flat) -> Tensor:
        there = self._inputs.send(self._arrays(flat))
        places = Places(
            slots=there["slots"],
            lengths=there["lengths"],
            tables=there["tables"],
            tiles=there["tiles"] if there["tiles"].shape[0] else None,
            splits=self._splits(there["lengths"].shape[0]),
        )
        return self._forward(there, places)

    def _empty(self, rows: int) -> None:
        self._inputs.send(_empty_decodes(rows, self._blocks_max))

    def _decode(self, rows: int) -> Tensor:
        """A step of decodes from where `_padded` puts its arrays; what a graph replays."""
        there = self._inputs.where(_empty_decodes(rows, self._blocks_max))
        places = Places(there["slots"], there["lengths"], there["tables"], None, self._splits(rows))
        logits = self._forward(there, places)
        self._tokens[:rows].copy_(logits.argmax(-1))
        return logits

    def _forward(self, there: dict[str, Tensor], places: Places) -> Tensor:
        feeds = there["feeds"]
        ids = torch.where(feeds < 0, there["ids"], self._tokens[feeds.clamp(min=0)])
        output = self._model(
            input_ids=ids[None],
            position_ids=there["positions"][None],
            use_cache=False,
            logits_to_keep=there["drawing"],
            step=CudaStep(self._cache, places),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _splits(self, decodes: int) -> int:
        return splits_for(max(1, decodes), self._cache.kv_heads, self._processors)

    def _arrays(self, flat: Flat) -> Arrays:
        decodes = flat.decodes
        return {
            "ids": flat.ids,
            "positions": flat.positions,
            "slots": flat.slots,
            "drawing": flat.drawing,
            "feeds": _feeds(flat, len(flat.ids)),
            "lengths": (flat.positions[:decodes] + 1).astype(np.int32),
            "tables": flat.tables.astype(np.int32),
            "tiles": tiles(flat.chunks[decodes:], self._tile_rows),
        }

    def _padded(self, flat: Flat, rows: int) -> Arrays:
        arrays, count = _empty_decodes(rows, self._blocks_max), len(flat.ids)
        arrays["ids"][:count] = flat.ids
        arrays["positions"][:count] = flat.positions
        arrays["slots"][:count] = flat.slots
        arrays["drawing"][:count] = flat.drawing
        arrays["feeds"][:] = _feeds(flat, rows)
        arrays["lengths"][:count] = flat.positions + 1
        arrays["tables"][:count, : flat.tables.shape[1]] = flat.tables
        return arrays


def _decodes_alone(flat: Flat) -> bool:
    return flat.decodes == len(flat.ids) == len(flat.sequences)


def _feeds(flat: Flat, rows: int) -> Ints:
    """[rows]: which of the tokens of the step before each row feeds on; -1: its id is known."""
    feeds = np.full(rows, -1, dtype=np.int64)
    for row, chunk in flat.unknown:
        feeds[row] = chunk.feeds_from
    return feeds


def _empty_decodes(rows: int, blocks_max: int) -> dict[str, NDArray[Any]]:
    """Arrays of padding rows alone."""
    return {
        "ids": np.zeros(rows, dtype=np.int64),
        "positions": np.zeros(rows, dtype=np.int64),
        "slots": np.full(rows, -1, dtype=np.int64),
        "drawing": np.zeros(rows, dtype=np.int64),
        "feeds": np.full(rows, -1, dtype=np.int64),
        "lengths": np.zeros(rows, dtype=np.int32),
        "tables": np.zeros((rows, blocks_max), dtype=np.int32),
    }


def _bytes_max(limits: Limits, blocks_max: int) -> int:
    """Of any step's arrays. A step has at most `step_tokens_max` chunks; tables have a row for each."""
    rows = max(limits.step_tokens_max, limits.sequences_max)
    return 5 * 8 * rows + 4 * rows + 16 * rows + 4 * blocks_max * limits.sequences_max + 16 * ALIGNMENT_BYTES
