"""Memory that ran out while a step was computed: how it shows, and what can be given back."""

from __future__ import annotations

import ctypes
import gc

import torch

SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)
"""In messages of plain RuntimeErrors: torch on the CPU, and libraries below torch."""


def is_shortage(error: BaseException) -> bool:
    """Whether a smaller step may succeed where this one failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


def free_caches(device: torch.device) -> None:
    """Gives back what allocators keep for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
