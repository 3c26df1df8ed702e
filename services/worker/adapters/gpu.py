"""What a GPU has free, as `nvidia-smi` says, and which of several GPUs an engine will see. Knows no torch.

An engine's `cuda:N` is the Nth entry of `CUDA_VISIBLE_DEVICES`, each an index, the beginning of a UUID, or a
MIG device; without it the Nth GPU in the order of the PCI bus, as the engines are told (engine/host.py), or
the first MIG device where GPUs are divided. Bound: `SMI_TIMEOUT_S` for each of two calls at most.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

SMI_TIMEOUT_S = 20.0
DEVICES = Path("/dev")
DEVICE_FILES = ("nvidia[0-9]*", "dxg", "nvhost-gpu")
"""Of a driver on Linux, of one in WSL, of an integrated GPU."""
MIB = 1 << 20
ENABLED = "Enabled"
GPU_LINE = re.compile(r"GPU (\d+): .*\(UUID: ([^)]+)\)")
MIG_LINE = re.compile(r"\s+MIG \S+\s+Device\s+(\d+): \(UUID: ([^)]+)\)")


@dataclass(frozen=True, slots=True)
class Part:
    """A MIG device."""

    index: int
    free_bytes: int | None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, in the order of the PCI bus."""

    uuid: str
    free_bytes: int | None
    """None: it does not say, as one that is divided, or one that shares the host's memory."""
    divided: bool = False
    parts: tuple[Part, ...] = ()


def free_bytes(number: int, visible: str | None) -> int | None:
    """Of the device that an engine calls `cuda:<number>`; None when there is none, or nobody says.

    `visible`: `CUDA_VISIBLE_DEVICES`, None when it is not set.
    """
    gpus = read_xml(_said("-q", "-x"))
    if any(gpu.divided for gpu in gpus):
        gpus = with_uuids(gpus, _said("-L"))
    return free_of(gpus, number, visible)


def has_driver(visible: str | None, devices: Path = DEVICES) -> bool:
    """Whether there is a GPU that an engine may see, also where `nvidia-smi` is missing."""
    if visible is not None and not _names(visible):
        return False
    return any(next(devices.glob(pattern), None) is not None for pattern in DEVICE_FILES)


def free_of(gpus: list[Gpu], number: int, visible: str | None) -> int | None:
    """As `free_bytes`, of these GPUs."""
    if visible is None:
        # CUDA shows one MIG device at most, and no GPU that is divided.
        parts = [part for gpu in gpus for part in gpu.parts]
        whole = [gpu for gpu in gpus if not gpu.divided]
        found: list[Gpu | Part] = [*parts[:1]] if parts else [*whole]
    else:
        found = list(_visible(gpus, _names(visible)))
    return found[number].free_bytes if number < len(found) else None


def read_xml(text: str) -> list[Gpu]:
    """The GPUs of `nvidia-smi -q -x`; none of what is no such text."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return []
    return [_gpu(element) for element in root.findall("gpu")]


def with_uuids(gpus: list[Gpu], listed: str) -> list[Gpu]:
    """The UUIDs of MIG devices, which many drivers tell by `nvidia-smi -L` alone."""
    uuids: dict[tuple[str, int], str] = {}
    of = ""
    for line in listed.splitlines():
        if gpu := GPU_LINE.match(line):
            of = gpu[2]
        elif part := MIG_LINE.match(line):
            uuids[of, int(part[1])] = part[2]
    return [
        replace(
            gpu,
            parts=tuple(
                replace(part, uuid=uuids.get((gpu.uuid, part.index), part.uuid)) for part in gpu.parts
            ),
        )
        for gpu in gpus
    ]


def _gpu(element: ElementTree.Element) -> Gpu:
    parts = [
        Part(int(part.findtext("index", "")), _free(part), part.findtext("uuid", "").strip())
        for part in element.iterfind("mig_devices/mig_device")
        if part.findtext("index", "").isdigit()
    ]
    divided = element.findtext("mig_mode/current_mig", "").strip() == ENABLED
    return Gpu(element.findtext("uuid", "").strip(), _free(element), divided, tuple(parts))


def _free(element: ElementTree.Element) -> int | None:
    """Of `81079 MiB`, or of `N/A` and the like."""
    count, _, unit = element.findtext("fb_memory_usage/free", "").strip().partition(" ")
    return int(count) * MIB if count.isdigit() and unit == "MiB" else None


def _names(visible: str) -> list[str]:
    """CUDA heeds those before the first that names nothing."""
    names = [name.strip() for name in visible.split(",")]
    wrong = next((at for at, name in enumerate(names) if not _may_name(name)), len(names))
    return names[:wrong]


def _may_name(name: str) -> bool:
    return name.isdigit() or name.startswith(("GPU-", "MIG-"))


def _visible(gpus: list[Gpu], names: list[str]) -> Iterator[Gpu | Part]:
    for name in names:
        everything: list[Gpu | Part] = [*gpus, *(part for gpu in gpus for part in gpu.parts)]
        found = [one for one in everything if one.uuid.startswith(name)]
        if name.isdigit():
            found = [*gpus[int(name) : int(name) + 1]]
        if len(found) != 1:
            return
        # A GPU that is divided stands for its first part.
        [one] = found
        yield one.parts[0] if isinstance(one, Gpu) and one.divided and one.parts else one


def _said(*arguments: str) -> str:
    """What `nvidia-smi` answers; nothing when it cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        # One GPU that is lost makes it fail, and still it tells of the others.
        done = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout
