"""What attention is asked for, and how transformers asks.

transformers calls `attend` through its AttentionInterface, once a layer, for a batch flattened to
[1, tokens]; the `Step` that came with the call says which of the tokens belong together, and computes.
No mask function is registered beside it, so transformers makes no masks. Two caches make steps: the CPU
kernels' (cpu/cache.py), and one of torch's operators for every device (gathered.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from services.worker.engine.layout import Flat

IMPLEMENTATION = "tokenloom"
KNOWN_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits"}
)
"""Arguments of an attention call that change nothing here."""


class UnknownArgument(Exception):
    """A model asks its attention for something that is not implemented."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """What a layer asks of its attention. `window` 0: unlimited; `softcap` 0: none."""

    scale: float
    window: int = 0
    softcap: float = 0.0


class Step(Protocol):
    """One step's tokens over the paged cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour) -> Tensor:
        """[heads, tokens, dim] and twice [kv_heads, tokens, dim] to [tokens, heads, dim].

        Keys and values go into the cache first.
        """


class KvCache(Protocol):
    """Keys and values of every layer, in blocks."""

    def begin(self, flat: Flat) -> Step:
        """What the layers of one step call."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: Step | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    unknown = [name for name, found in others.items() if name not in KNOWN_ARGUMENTS and found is not None]
    if unknown or step is None or attention_mask is not None:
        raise UnknownArgument(f"attention arguments: {', '.join(unknown) or 'a mask, or no step'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    flavour = Flavour(scale, sliding_window or 0, softcap or 0.0)
    out = step.attend(cast(int, module.layer_idx), query[0], key[0], value[0], flavour)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes IMPLEMENTATION known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attend)
