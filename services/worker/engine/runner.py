"""Runs one plan through the model: tokens in, logits of the last tokens out.

The model is transformers' own; the batch is flattened to [1, tokens], and its attention is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Limits, Plan
from services.worker.engine.caches import make_cache
from services.worker.engine.layout import BlockTables, Flat, Ints, flatten
from services.worker.engine.loader import LoadedModel


class Runner:
    """One model and its KV cache."""

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._block_tokens = limits.block_tokens
        self._cache = make_cache(loaded, limits.block_tokens)
        self._tables = BlockTables(
            limits.sequences_max, blocks_for(limits.context_length, limits.block_tokens)
        )

    def prepare(self, plan: Plan) -> Flat:
        """Lays a plan out; the one before may be running."""
        return flatten(plan, self._tables, self._block_tokens)

    @torch.inference_mode()
    def run(self, flat: Flat) -> Tensor | None:
        """Logits [sequences, vocabulary] for the sequences that draw; None when none does.

        The tokens that were unknown when the plan was laid out are known by now.
        """
        flat.fill()
        step = self._cache.begin(flat)
        output = self._model(
            input_ids=self._to_device(flat.ids)[None],
            position_ids=self._to_device(flat.positions)[None],
            use_cache=False,
            logits_to_keep=self._to_device(flat.drawing),
            step=step,
        )
        return output.logits[0] if flat.sequences else None

    def _to_device(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device)
