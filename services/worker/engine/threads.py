"""How many threads torch computes with."""

from __future__ import annotations

import os

import torch


def use_threads(count: int) -> int:
    """Sets the number of threads; 0: as many as this process may use. Returns it."""
    count = count or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count
