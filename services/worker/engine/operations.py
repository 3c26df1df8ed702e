"""What a plain decoder layer does between its products: with torch's operators, or with the CPU kernels.

Both compute the same; fused.py is written against the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from services.worker.engine.attention import Flavour, Step
from services.worker.engine.cpu.cache import KernelStep, Norms
from services.worker.engine.cpu.kernels import Kernels

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, each [1, tokens, rotated part of a head]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention."""

    layer: int
    count: int
    """Of the queries."""
    rotated: int
    """Of the queries and the keys."""
    dim: int
    flavour: Flavour
    query_norm: Any
    key_norm: Any
    """RMS norms of each head, or None."""

    def norms(self) -> Norms | None:
        """Their weights and epsilon."""
        if self.query_norm is None:
            return None
        return self.query_norm.weight, self.key_norm.weight, self.query_norm.variance_epsilon


class Operations(Protocol):
    """The three kinds of work between the products."""

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """RMS norm over the last dimension."""

    def gate(self, both: Tensor) -> Tensor:
        """[tokens, 2 · width], the gate's input first, to [tokens, width]."""

    def mix(self, heads: Heads, qkv: Tensor, turn: Turn, step: Step) -> Tensor:
        """[tokens, (heads + 2 · kv_heads) · dim] to [tokens, heads · dim]: norms, positions, attention."""


class TorchOperations:
    """On any device."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self._act = act

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    def gate(self, both: Tensor) -> Tensor:
        width = both.shape[-1] // 2
        return self._act(both[:, :width]).mul_(both[:, width:])

    def mix(self, heads: Heads, qkv: Tensor, turn: Turn, step: Step) -> Tensor:
        every = qkv.view(qkv.shape[0], -1, heads.dim)
        both, value = every[:, : heads.rotated], every[:, heads.rotated :]
        if heads.query_norm is not None:
            query, key = both[:, : heads.count], both[:, heads.count :]
            both = torch.cat([self.norm(heads.query_norm, query), self.norm(heads.key_norm, key)], 1)
        both = rotate(both, *turn)
        query, key = both[:, : heads.count], both[:, heads.count :]
        mixed = step.attend(
            heads.layer, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), heads.flavour
        )
        return mixed.flatten(1)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions for [tokens, heads, dim]; the halves of a head are each other's partners."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cosines[0].unsqueeze(1), turned, sines[0].unsqueeze(1))


class KernelOperations:
    """On a CPU, `gate` being a name that the kernels know."""

    def __init__(self, kernels: Kernels, gate: str) -> None:
        self._kernels = kernels
        self.gate_name = gate

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        return self._kernels.norm(x, norm.weight, norm.variance_epsilon)

    def gate(self, both: Tensor) -> Tensor:
        return self._kernels.gate(both, self.gate_name)

    def mix(self, heads: Heads, qkv: Tensor, turn: Turn, step: Step) -> Tensor:
        every = qkv.view(qkv.shape[0], -1, heads.dim)
        # A model that was arranged for the kernels has the kernels' cache.
        own = cast(KernelStep, step)
        return own.attend_joined(heads.layer, every, heads.count, turn, heads.norms(), heads.flavour).flatten(
            1
        )
