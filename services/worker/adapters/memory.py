"""How much memory this machine, this container or its GPU can give to engines, and what its CPU can do.

Asked once, when a worker starts: what others take later is theirs. Knows no torch; GPUs are asked in `gpu`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from services.worker.adapters import gpu
from services.worker.engine.memory import CGROUP, MEMINFO, host_available_bytes
from services.worker.settings import WorkerSettings

CPUINFO = Path("/proc/cpuinfo")
HOST_KEPT_SHARE = 0.1
"""Of free host memory: for the front, its neighbours and the page cache."""
DEVICE_KEPT_SHARE = 0.05
"""Of a GPU's free memory: what drivers and libraries take as they go."""
FAST_BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16", "svebf16"})
"""Features, as the kernel names them, with which products in bfloat16 are faster than in float32."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where the engines of a worker run."""

    kind: Literal["cpu", "cuda"]
    budget_bytes: int
    """For the engines of all models; 0: not bounded, for nobody says what there is."""
    cpu_features: frozenset[str] = frozenset()

    @property
    def fast_bf16(self) -> bool:
        """Whether this CPU multiplies bfloat16 in hardware."""
        return bool(FAST_BF16 & self.cpu_features)


def look(settings: WorkerSettings) -> Device:
    """May take seconds where there is a GPU."""
    kind: Literal["cpu", "cuda"] = "cpu"
    if settings.engine == "torch" and _may_be_cuda(settings.device):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        free_bytes, kept_share = gpu.free_bytes(_number(settings.device), visible), DEVICE_KEPT_SHARE
        if settings.device != "auto" or free_bytes is not None or gpu.has_driver(visible):
            kind = "cuda"
    if kind == "cpu":
        free_bytes, kept_share = available_bytes(), HOST_KEPT_SHARE
    return Device(kind, settings.memory_bytes or _less(free_bytes, kept_share), cpu_features())


def _less(free_bytes: int | None, kept_share: float) -> int:
    """A budget; of nothing it is not 0, which means that nobody knows."""
    return 0 if free_bytes is None else max(1, int(free_bytes * (1 - kept_share)))


def _may_be_cuda(device: str) -> bool:
    """Of a setting like `auto`, `cpu` or `cuda:1`."""
    return device.startswith("cuda") or (device == "auto" and _torch_has_cuda())


def _number(device: str) -> int:
    digits = device.partition(":")[2]
    return int(digits) if digits.isdigit() else 0


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """As the kernel names them; empty where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """What the kernel and the container's limit both leave; None where nobody says."""
    try:
        return host_available_bytes(meminfo, cgroup)
    except OSError:
        return None


def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
