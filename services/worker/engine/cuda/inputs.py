"""A step's arrays on their way to the device: one copy from pinned memory, nobody waits.

Two layouts share one buffer on the device, which steps in the order of the stream use one after the
other: that of eager steps, as long as they are; and for each size of a graph a fixed one, so that what
was captured finds its inputs at the same addresses in every replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT_BYTES = 16
RING = 3
"""Pinned buffers: one is filled while two steps are on their way."""

Arrays = Mapping[str, NDArray[Any]]


class Inputs:
    """Arrays of at most `bytes_max` a step, padding included. At most RING - 1 steps may be on their way."""

    def __init__(self, bytes_max: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._staged = [torch.empty(bytes_max, dtype=torch.uint8, pin_memory=pinned) for _ in range(RING)]
        self._views = [staged.numpy() for staged in self._staged]
        self._there = torch.zeros(bytes_max, dtype=torch.uint8, device=device)
        self._turn = 0

    def send(self, arrays: Arrays) -> dict[str, Tensor]:
        """The same arrays on the device. They last until the next call."""
        self._turn = (self._turn + 1) % RING
        staged, view = self._staged[self._turn], self._views[self._turn]
        places = _layout(arrays)
        end = places[-1][1] if places else 0
        if end > len(view):
            raise ValueError(f"{end} bytes of a step do not fit into {len(view)}")
        for array, (begin, end) in zip(arrays.values(), places, strict=True):
            view[begin:end].view(array.dtype).reshape(array.shape)[...] = array
        self._there[:end].copy_(staged[:end], non_blocking=True)
        return self.where(arrays)

    def where(self, arrays: Arrays) -> dict[str, Tensor]:
        """Where arrays of these types and shapes, in this order, are on the device after `send`."""
        found = {}
        for (name, array), (begin, end) in zip(arrays.items(), _layout(arrays), strict=True):
            dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
            found[name] = self._there[begin:end].view(dtype).view(array.shape)
        return found


def _layout(arrays: Arrays) -> list[tuple[int, int]]:
    places, begin = [], 0
    for array in arrays.values():
        places.append((begin, begin + array.nbytes))
        begin += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places
