"""Which cache a model gets."""

from __future__ import annotations

from services.worker.engine.attention import KvCache
from services.worker.engine.cpu.cache import KernelCache
from services.worker.engine.gathered import GatheredCache
from services.worker.engine.loader import LoadedModel


def make_cache(loaded: LoadedModel, block_tokens: int) -> KvCache:
    """The kernels' where the model was arranged for them, otherwise torch's operators'."""
    if loaded.kernels is not None:
        return KernelCache(loaded.kernels, loaded.shape, loaded.blocks, block_tokens, loaded.dtype)
    return GatheredCache(loaded.shape, loaded.blocks, block_tokens, loaded.dtype, loaded.device)
