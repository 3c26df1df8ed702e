"""How much memory there is, and how much of it the KV cache takes.

Weights, the cache's minimum and a step's activations are weighed against what is free before anything
is loaded. Knows neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.worker.core.blocks import blocks_for
from services.worker.engine.errors import too_large

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CPU_SHARE = 0.25
"""Of the host memory left beside the weights, unless `kv_cache_bytes` says otherwise."""
CPU_CACHE_BYTES_MAX = 4 << 30
DEVICE_SHARE = 0.85
"""Of a GPU's memory left beside the weights, until a step was measured."""
HEAD_ROOM_SHARE = 0.05
"""Of a GPU's whole memory: CUDA graphs, fragments, and what libraries take as they go."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory depends on, from config.json and the files."""

    weight_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    context_length: int
    vocab_size: int

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes


def host_available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Free host memory, or what the control group leaves of it. Raises OSError where nobody says."""
    free_bytes, limit = _meminfo_available(meminfo), _number(cgroup / "memory.max")
    if limit is None:
        return free_bytes
    used_bytes = (_number(cgroup / "memory.current") or 0) - _file_cache_bytes(cgroup / "memory.stat")
    return max(0, min(free_bytes, limit - max(0, used_bytes)))


def cache_blocks(
    shape: Shape, *, available_bytes: int, wanted_bytes: int, sequences_max: int, block_tokens: int,
    step_tokens_max: int, on_device: bool,
) -> int:  # fmt: skip
    """Blocks of the KV cache. Raises EngineError MODEL_TOO_LARGE with the numbers.

    At least one block, at most what `sequences_max` whole contexts need.
    """
    block_bytes = shape.kv_token_bytes * block_tokens
    activation_bytes = 4 * sequences_max * shape.vocab_size * 3 + step_tokens_max * shape.kv_token_bytes
    fixed_bytes = shape.weight_bytes + activation_bytes
    left_bytes = available_bytes - fixed_bytes
    if left_bytes < max(block_bytes, wanted_bytes):
        what = f"weights ({shape.weight_bytes:,}), KV cache and activations together"
        raise too_large(what, fixed_bytes + max(block_bytes, wanted_bytes), available_bytes)
    whole = sequences_max * blocks_for(shape.context_length, block_tokens)
    share_bytes = int(left_bytes * DEVICE_SHARE) if on_device else int(left_bytes * CPU_SHARE)
    if not on_device:
        share_bytes = min(share_bytes, CPU_CACHE_BYTES_MAX)
    if wanted_bytes and wanted_bytes < block_bytes:
        raise too_large("one block of the KV cache", block_bytes, wanted_bytes)
    return max(1, min(whole, (wanted_bytes or share_bytes) // block_bytes))


def device_blocks(
    shape: Shape, *, free_bytes: int, total_bytes: int, step_bytes: int, sequences_max: int, block_tokens: int
) -> int:
    """Blocks of a device's KV cache, its weights being there. Raises EngineError MODEL_TOO_LARGE."""
    block_bytes = shape.kv_token_bytes * block_tokens
    head_room_bytes = int(total_bytes * HEAD_ROOM_SHARE)
    left_bytes = free_bytes - step_bytes - head_room_bytes
    if left_bytes < block_bytes:
        what = f"a step's activations ({step_bytes:,}), head-room ({head_room_bytes:,}) and KV cache"
        raise too_large(what, step_bytes + head_room_bytes + block_bytes, free_bytes)
    whole = sequences_max * blocks_for(shape.context_length, block_tokens)
    return min(whole, left_bytes // block_bytes)


def _meminfo_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} names no MemAvailable")


def _file_cache_bytes(stat: Path) -> int:
    """What the kernel takes back when others need it: files that were read or written, as just fetched ones.

    MemAvailable leaves it out too, while `memory.current` has it.
    """
    try:
        fields = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(field[1]) for field in fields if field[0] in ("active_file", "inactive_file"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
