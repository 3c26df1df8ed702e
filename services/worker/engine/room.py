"""How large the KV cache of a device is: all that its weights and its largest step leave, but a head-room.

What a step takes is measured, by running the largest one there can be with a small cache. CUDA graphs
share their activations with each other and have to fit, with what the allocator loses to fragments, into
the head-room. On the CPU, and where the size is configured, nothing is changed.
"""

from __future__ import annotations

import gc
import sys
import time

import torch

from services.worker.core.blocks import blocks_for
from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.loader import LoadedModel
from services.worker.engine.memory import device_blocks
from services.worker.engine.warmup import largest_step

GIB = 1 << 30


def fitted(loaded: LoadedModel, config: EngineConfig) -> LoadedModel:
    """The model with the cache that fits. Raises EngineError MODEL_TOO_LARGE with the numbers."""
    if loaded.device.type != "cuda" or config.kv_cache_bytes:
        return loaded
    step_bytes = _step_bytes(loaded, config)
    free_bytes, total_bytes = torch.cuda.mem_get_info(loaded.device)
    blocks = device_blocks(
        loaded.shape,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        step_bytes=step_bytes,
        sequences_max=config.sequences_max,
        block_tokens=config.block_tokens,
    )
    cache_bytes = blocks * config.block_tokens * loaded.shape.kv_token_bytes
    left_bytes = free_bytes - step_bytes - cache_bytes
    print(
        f"memory of {loaded.device}: {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free beside the "
        f"weights; a step takes {step_bytes / GIB:.2f}, the KV cache {cache_bytes / GIB:.1f}, "
        f"{left_bytes / GIB:.1f} GiB are left over",
        file=sys.stderr,
    )
    return loaded.with_blocks(blocks)


def _step_bytes(loaded: LoadedModel, config: EngineConfig) -> int:
    """What the largest step takes at its peak, beside weights and cache."""
    _collect()
    held_bytes = torch.cuda.memory_allocated(loaded.device)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    sequences = min(config.sequences_max, config.step_tokens_max)
    each = blocks_for(config.step_tokens_max // sequences + 2, config.block_tokens) + 1
    engine = Engine(loaded.with_blocks(sequences * each), config, time.monotonic_ns)
    largest_step(engine)
    cache_bytes = sequences * each * config.block_tokens * loaded.shape.kv_token_bytes
    peak_bytes = torch.cuda.max_memory_allocated(loaded.device) - held_bytes - cache_bytes
    del engine
    _collect()
    return max(0, peak_bytes)


def _collect() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
