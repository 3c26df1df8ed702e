"""Manners of the engine's process on its host: environment, memory allocator, threads.

Libraries read the environment when they are loaded, so torch is not imported here before it is needed.
"""

from __future__ import annotations

import ctypes
import gc
import os

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # How long a thread that waits for the others keeps its core, in turns of a loop: 1 to 2 ms. The
    # default is several times a scheduler's time slice, so on cores that gateway and proxies share with
    # the engine, threads would mostly wait for threads that cannot run.
    "GOMP_SPINCOUNT": "30000",
    # As nvidia-smi counts, which the front asks for the memory of the same device; CUDA's own order begins
    # with the fastest.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
COLLECT_AFTER = 50_000
"""Objects made and not yet gone, until the youngest are looked at."""
KEPT_BYTES = 1 << 30
"""Freed memory below this stays in the process: a step frees and takes the same activations again."""


def prepare_environment() -> None:
    """Call before torch is imported. What the caller's environment sets already is left alone."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Spares each step the page faults of its activations; without glibc nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def spare_collections() -> None:
    """Once everything is loaded: what lives for good is left out of collections, and those are rarer.

    A step of hundreds of sequences makes thousands of small objects, which end by themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def schedule_as_usual() -> None:
    """An engine computes like any program, also when its front was told to keep in the background.

    Call before there are threads: each one inherits it.
    """
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def use_threads(count: int) -> int:
    """Sets torch's threads; 0: as many as this process may use. Returns their number."""
    import torch

    count = count or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count
