"""Runs one plan through the model: tokens in, drawn tokens out.

The model is transformers' own; the batch is flattened to [1, tokens], and its attention is ours. This
runner computes when it is asked to; that of a device which computes by itself is in cuda/.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.worker.core.blocks import blocks_for
from services.worker.core.plan import Limits, Plan
from services.worker.engine.caches import make_cache
from services.worker.engine.history import History
from services.worker.engine.layout import BlockTables, Flat, Ints, flatten
from services.worker.engine.loader import LoadedModel
from services.worker.engine.sampling import Batch, Drawn, choose


class Pending(Protocol):
    """A step that was started."""

    def wait(self) -> Drawn:
        """Its tokens, once the device has them. Call it once."""


class StepRunner(Protocol):
    """One model and its KV cache. Steps are launched in the order in which they were prepared."""

    ahead: bool
    """Whether a step can be launched before the one before it was waited for."""

    def prepare(self, plan: Plan) -> Flat:
        """Lays a plan out; those before may be running."""

    def launch(self, flat: Flat, histories: Seq[History]) -> Pending:
        """Starts a step. The tokens that it feeds on come from the step launched before."""

    def forget(self) -> None:
        """Lets go of what was kept from step to step: a step was taken back."""

    def warm_up(self) -> None:
        """Prepares what would cost the first requests time, once the first steps ran."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that has ended already."""

    drawn: Drawn

    def wait(self) -> Drawn:
        return self.drawn


class Batches:
    """The sampling parameters of the step before, which are mostly those of the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = Batch([], device)

    def of(self, flat: Flat, histories: Seq[History]) -> Batch:
        """Those of this step."""
        if not self._last.is_for(flat.sequences):
            self._last = Batch(histories, self._device)
        return self._last

    def forget(self) -> None:
        """Keeps nothing."""
        self._last = Batch([], self._device)


class Runner:
    """Computes at once, on any device, with whatever cache suits it."""

    ahead = False

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._block_tokens = limits.block_tokens
        self._cache = make_cache(loaded, limits.block_tokens)
        self._batches = Batches(loaded.device)
        self._tables = BlockTables(
            limits.sequences_max, blocks_for(limits.context_length, limits.block_tokens)
        )

    def prepare(self, plan: Plan) -> Flat:
        return flatten(plan, self._tables, self._block_tokens)

    def launch(self, flat: Flat, histories: Seq[History]) -> Done:
        logits = self.run(flat)
        if logits is None:
            return Done(Drawn([], []))
        return Done(choose(logits, self._batches.of(flat, histories), flat.drawn_positions).drawn())

    def forget(self) -> None:
        self._batches.forget()

    def warm_up(self) -> None:
        """Nothing is left to do."""

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
