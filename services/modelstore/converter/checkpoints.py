"""The files of a model folder as tensors by name: safetensors, or PyTorch checkpoints.

A checkpoint is a zip archive with a pickle in it. It is read with `weights_only=True`, which builds tensors
and plain containers and calls nothing else, and only after a look at what its pickle asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint

from services.modelstore.core.refusal import Refused, source_invalid

PICKLE_BYTES_MAX = 64 * 1024 * 1024
"""Of the pickle in a checkpoint: names and shapes, no weights."""
CURE = "save the model as safetensors where you trust it (save_pretrained with transformers 4.30 or newer)"


class TensorFiles(Protocol):
    """Tensors of a model, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """A tensor that shares its memory with no other."""
        ...


class SafetensorsFiles:
    """The tensors of safetensors files."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        self._where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._where.items()}

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


class Checkpoints:
    """The tensors of PyTorch checkpoints, mapped into memory. Raises Refused for what is not only tensors."""

    def __init__(self, label: str, files: list[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in _load(label, file).items():
                if name in self._tensors:
                    raise source_invalid(label, f"tensor {name!r} lies in {file.name} and in an earlier file")
                self._tensors[name] = tensor
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        # Two names may stand for one tensor, and a safetensors file holds none twice.
        return self._tensors[name].clone(memory_format=torch.contiguous_format)


def _load(label: str, file: Path) -> dict[str, torch.Tensor]:
    _check_archive(label, file)
    try:
        asked = sorted(get_unsafe_globals_in_checkpoint(file))
        if asked:
            raise _code(label, file, ", ".join(asked[:3]))
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Refused:
        raise
    except UnpicklingError:
        raise _code(label, file, "it asks for more than tensors") from None
    except Exception as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise source_invalid(label, f"{file.name} is damaged: {why}; fetch it again") from None
    return _checked(label, file, found)


def _check_archive(label: str, file: Path) -> None:
    """Nothing packed, and nothing but a checkpoint: reading it takes no more memory than it has bytes."""
    try:
        with ZipFile(file) as archive:
            members = archive.infolist()
    except (BadZipFile, OSError, ValueError) as error:
        raise source_invalid(
            label, f"{file.name} is cut off or no checkpoint ({error}); fetch it again"
        ) from None
    names = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise _code(label, file, "it is a TorchScript program")
    for member in members:
        if member.compress_type != ZIP_STORED:
            raise source_invalid(label, f"{file.name} is a compressed archive; {CURE}")
        if member.filename.endswith(".pkl") and member.file_size > PICKLE_BYTES_MAX:
            cause = f"{file.name} has a pickle of {member.file_size} bytes; at most {PICKLE_BYTES_MAX}"
            raise source_invalid(label, f"{cause}; {CURE}")


def _checked(label: str, file: Path, found: Any) -> dict[str, torch.Tensor]:
    if not isinstance(found, dict):
        raise source_invalid(
            label, f"{file.name} holds a {type(found).__name__}, not tensors by name; {CURE}"
        )
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = type(value).__name__
            raise source_invalid(
                label, f"{file.name} holds a {kind} under {str(name)[:80]!r}, not a plain tensor; {CURE}"
            )
    return dict(found)


def _code(label: str, file: Path, asked: str) -> Refused:
    return source_invalid(label, f"{file.name} holds code ({asked}), which is never run; {CURE}")
