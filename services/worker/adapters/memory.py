"""How much memory this machine, this container or its GPU can give to engines, and what its CPU can do.

Asked once, when a worker starts: what others take later is theirs. Knows no torch: a GPU is asked through
`nvidia-smi`, bounded by `SMI_TIMEOUT_S`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from services.worker.settings import WorkerSettings

MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
HOST_KEPT_SHARE = 0.1
"""Of free host memory: for the front, its neighbours and the page cache."""
DEVICE_KEPT_SHARE = 0.05
"""Of a GPU's free memory: what drivers and libraries take as they go."""
SMI_TIMEOUT_S = 20.0
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
    on_cuda = settings.engine == "torch" and device_kind(settings.device) == "cuda"
    if settings.memory_bytes:
        budget_bytes = settings.memory_bytes
    elif on_cuda:
        budget_bytes = int(cuda_free_bytes(settings.device) * (1 - DEVICE_KEPT_SHARE))
    else:
        budget_bytes = int(available_bytes() * (1 - HOST_KEPT_SHARE))
    return Device("cuda" if on_cuda else "cpu", budget_bytes, cpu_features())


def device_kind(device: str) -> Literal["cpu", "cuda"]:
    """What a setting like `auto`, `cpu` or `cuda:1` comes to here."""
    if device.startswith("cuda"):
        return "cuda"
    return "cuda" if device == "auto" and _torch_has_cuda() and cuda_free_bytes(device) else "cpu"


def cuda_free_bytes(device: str) -> int:
    """Free memory of the device that `auto`, `cuda` or `cuda:N` names; 0 when there is none to be seen."""
    smi = shutil.which("nvidia-smi")
    number = int(device.partition(":")[2] or 0) if device.partition(":")[2].isdigit() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] if visible is None else [name.strip() for name in visible.split(",")]
    chosen = names[0] if visible is None else names[number] if number < len(names) else ""
    if smi is None or not chosen or chosen == "-1":
        return 0
    command = [smi, "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", chosen]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
        return int(said.stdout.split()[0]) * 1024 * 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """As the kernel names them; empty where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """The lesser of what the kernel and the container's limit leave; 0 where neither can be read."""
    figures = [figure for figure in (_of_kernel(meminfo), _of_container(cgroup)) if figure is not None]
    return min(figures, default=0)


def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False


def _of_kernel(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        return max(0, int(limit) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        return None
