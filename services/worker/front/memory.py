"""What a version's engine takes of a worker's memory, said before anything is fetched, and who has what.

A reservation is an upper bound, from the manifest and the configuration of the model alone: the weights as
the engine will hold them, what loading takes beside them, the KV cache, one step, and the process itself.
The budget is one for all engines of a worker; `Budget` never promises more than there is. Pure arithmetic:
no clock, no device, no files. How the figures come about: docs/reference/worker-memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from services.worker.front.ports import ModelVersion
from services.worker.front.reservation import GIB, MIB, Reservation

CPU_PROCESS_BYTES = 512 * MIB
"""An engine on a CPU beside its model. Measured: 431 to 447 MiB resident, with torch 2.13's CPU build, for a
model of 0.1 MiB that had answered 64 sequences; 170 MiB of it are libraries that engines share."""
CUDA_PROCESS_BYTES = 2560 * MIB
"""On a CUDA device: context, workspaces, fragments and the graphs of decode steps. Measured on an H100, with
graphs for 256 sequences: 0.9 to 1.6 GiB."""
CACHE_SHARE = 0.25
"""Of what a budget leaves beside a model, for its KV cache."""
CPU_CACHE_BYTES_MAX = 4 * GIB
MODERATE_TOKENS = 2048
"""A sequence's length, where the KV cache is to hold `sequences_max` of them."""
LEAST_TOKENS = 8192
"""A KV cache holds one whole context at least, or so much of a longer one."""
LOGITS_COPIES = 8
"""Rows of a vocabulary in float32 for each sequence of a step: sorted, summed, as probabilities."""
LOADING_TENSORS = 2
"""Copies of the largest weight while it is packed."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VECTOR = 16
"""The CPU's KV cache pads a block's tokens to whole vectors."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the engines of a worker are started with, as far as memory depends on it."""

    device: Literal["cpu", "cuda"]
    dtype: str
    """`auto` or the name of one."""
    kv_cache_bytes: int
    """Of each engine; 0: to be chosen here."""
    sequences_max: int
    step_tokens: int
    block_tokens: int
    process_bytes: int = 0
    """Of each engine beside its model; 0: as measured for this kind of device."""
    fast_bf16: bool = False
    """Whether this CPU multiplies bfloat16 in hardware."""
    widening_types: frozenset[str] = frozenset()
    """`model_type` of families whose bfloat16 weights stay so while they are multiplied in float32."""


def reserve(version: ModelVersion, terms: Terms, budget_bytes: int, *, whole: bool = False) -> Reservation:
    """What an engine of this version takes out of a budget (0: one without bound).

    It depends on the whole budget and not on what is free, so that a version has one figure. `whole`: it is
    the worker's only model and sizes its own cache.
    """
    compute, held = _dtypes(version, terms)
    stored_size, held_size = DTYPE_BYTES.get(version.dtype, 2), DTYPE_BYTES[held]
    on_cpu = terms.device == "cpu"
    weight_bytes = -(-version.stored_bytes * held_size // stored_size)
    # A model whose head is its embedding has both on a CPU: the head is packed for products.
    embedding_bytes = min(weight_bytes, version.vocab_size * version.hidden_size * held_size) or weight_bytes
    token_bytes = version.kv_bytes_per_token * DTYPE_BYTES[compute] // stored_size
    # A change of dtype has the files' numbers beside its own; packing has a few copies of one weight.
    converted = max(version.stored_bytes, weight_bytes)
    packed = min(weight_bytes, LOADING_TENSORS * embedding_bytes)
    usual_bytes = CPU_PROCESS_BYTES if on_cpu else CUDA_PROCESS_BYTES
    needs = Reservation(
        weights_bytes=weight_bytes + (embedding_bytes if on_cpu and version.tied else 0),
        step_bytes=_step_bytes(version, terms, token_bytes),
        loading_bytes=(packed if held == version.dtype else converted) if on_cpu else 0,
        process_bytes=terms.process_bytes or usual_bytes,
    )
    left_bytes = max(0, budget_bytes - needs.total_bytes) if budget_bytes else None
    if whole and not terms.kv_cache_bytes:
        return replace(
            needs, rest_bytes=max(left_bytes or 0, _least_cache_bytes(version, terms, token_bytes))
        )
    cache_bytes = terms.kv_cache_bytes or _cache_bytes(version, terms, token_bytes, left_bytes)
    padding = -(-terms.block_tokens // VECTOR) * VECTOR / terms.block_tokens if on_cpu else 1
    return replace(needs, cache_bytes=int(cache_bytes * padding), kv_cache_bytes=cache_bytes)


def _dtypes(version: ModelVersion, terms: Terms) -> tuple[str, str]:
    """In which the engine computes, and in which it holds the weights."""
    stored, on_cpu = version.dtype if version.dtype in DTYPE_BYTES else "bfloat16", terms.device == "cpu"
    compute = terms.dtype
    if compute == "auto":
        compute = "float32" if on_cpu and not terms.fast_bf16 else stored
        compute = "bfloat16" if on_cpu and compute == "float16" else compute
    widened = on_cpu and compute == "float32" and version.model_type in terms.widening_types
    return compute, "bfloat16" if widened and version.dtype == "bfloat16" else compute


def _step_bytes(version: ModelVersion, terms: Terms, token_bytes: int) -> int:
    logits = 4 * terms.sequences_max * version.vocab_size * LOGITS_COPIES
    tables = 3 * 8 * terms.sequences_max * -(-version.context_length // terms.block_tokens)
    return logits + tables + terms.step_tokens * token_bytes


def _blocks_bytes(tokens: int, terms: Terms, token_bytes: int) -> int:
    return -(-tokens // terms.block_tokens) * terms.block_tokens * token_bytes


def _least_cache_bytes(version: ModelVersion, terms: Terms, token_bytes: int) -> int:
    return _blocks_bytes(min(version.context_length, LEAST_TOKENS), terms, token_bytes)


def _cache_bytes(version: ModelVersion, terms: Terms, token_bytes: int, left_bytes: int | None) -> int:
    """Enough for all sequences at a moderate length, within a share of what is left; at least the least."""
    moderate = min(version.context_length, MODERATE_TOKENS)
    wanted = terms.sequences_max * _blocks_bytes(moderate, terms, token_bytes)
    bounds = [wanted] if token_bytes else []
    if left_bytes is not None:
        bounds.append(int(left_bytes * CACHE_SHARE))
    if terms.device == "cpu":
        bounds.append(CPU_CACHE_BYTES_MAX)
    return max(_least_cache_bytes(version, terms, token_bytes), min(bounds, default=0))


@dataclass(slots=True)
class Budget:
    """Who has reserved how much; the sum is never above `total_bytes` (0: no bound)."""

    total_bytes: int
    _held: dict[str, int] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        """The sum of what is reserved."""
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        """What the next reservation may have."""
        return max(0, self.total_bytes - self.used_bytes)

    def of(self, key: str) -> int:
        """What `key` has reserved; 0: nothing."""
        return self._held.get(key, 0)

    def fits(self, size_bytes: int) -> bool:
        """Whether so much is free."""
        return not self.total_bytes or size_bytes <= self.free_bytes

    def reserve(self, key: str, size_bytes: int) -> bool:
        """Take so much for `key`; False, and nothing taken, when it does not fit.

        Raises ValueError when `key` has reserved before.
        """
        if key in self._held:
            raise ValueError(f"{key} has reserved already")
        if not self.fits(size_bytes):
            return False
        self._held[key] = size_bytes
        return True

    def release(self, key: str) -> int:
        """Give back what `key` has; how much that was."""
        return self._held.pop(key, 0)
