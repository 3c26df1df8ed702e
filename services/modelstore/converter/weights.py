"""Casts a source's tensors one by one and holds them against the model that the configuration makes.

What the headers tell (names, shapes, ties) is checked before the first tensor is cast.

Memory is bounded by one tensor in float32 and one shard of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from services.modelstore.converter.checkpoints import TensorFiles
from services.modelstore.converter.shards import ShardWriter
from services.modelstore.core.refusal import source_invalid
from services.modelstore.core.support import REARRANGED

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOAT16_MAX = 65_504.0

OnBytes = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Expected:
    """The tensors that a configuration asks for."""

    model: Any
    """The model without its weights (meta tensors)."""
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    """Names that share another tensor and are not stored -> that tensor's name."""
    by_name: bool
    """Whether the stored tensors have these names and shapes; otherwise only loading them tells."""


class Tensors(Protocol):
    """A source of tensors under transformers' names, in a fixed order."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def expect(config: Any) -> Expected:
    """What `config` makes, without allocating it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = dict(model.all_tied_weights_keys)
    return Expected(model, shapes, tied, by_name=config.model_type not in REARRANGED)


def write(
    label: str, tensors: Tensors, expected: Expected, dtype: str, writer: ShardWriter, on_bytes: OnBytes
) -> list[str]:
    """Cast and write every tensor; the files. Raises Refused when names or shapes do not fit."""
    target = DTYPES[dtype]
    wanted = {name: shape for name, shape in expected.shapes.items() if name not in expected.tied}
    total = sum(_size(shape) for shape in wanted.values()) * target.itemsize
    on_bytes(0, total)
    for name, tensor in tensors:
        if _ignorable(name, expected.tied):
            continue
        _check_values(label, name, tensor)
        if expected.by_name:
            _check_place(label, name, tuple(tensor.shape), wanted)
        writer.add(name, _cast(label, name, tensor, target))
        on_bytes(writer.size_bytes, total)
    if expected.by_name:
        _check_complete(label, sorted(wanted.keys() - writer.names))
    return writer.finish()


def check_by_loading(label: str, folder: Path, expected: Expected, dtype: str) -> None:
    """Load what was written, where names alone cannot tell. Takes the model's whole size in memory."""
    if expected.by_name:
        return
    _, found = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True)
    _check_complete(label, sorted(found["missing_keys"]))
    if unknown := sorted(found["unexpected_keys"]):
        raise source_invalid(label, f"has a tensor {unknown[0]!r} that its configuration knows nothing of")
    if mismatched := sorted(str(key) for key in found["mismatched_keys"]):
        raise source_invalid(label, f"tensor {mismatched[0]} has another shape than its configuration makes")


def _check_complete(label: str, missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise source_invalid(label, f"has no tensor {missing[0]!r}{more}, which its configuration asks for")


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _ignorable(name: str, tied: Mapping[str, str]) -> bool:
    # Rotary tables are computed from the configuration; old checkpoints carry them along.
    return name in tied or name.endswith("rotary_emb.inv_freq")


def _check_place(
    label: str, name: str, found: tuple[int, ...], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    if name not in wanted:
        raise source_invalid(label, f"has a tensor {name!r} that its configuration knows nothing of")
    if found != wanted[name]:
        shape, other = list(found), list(wanted[name])
        raise source_invalid(label, f"tensor {name!r} has shape {shape}; its configuration makes it {other}")


def _check_values(label: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise source_invalid(
            label, f"tensor {name!r} is {tensor.dtype}: import weights that are not quantised"
        )


def _cast(label: str, name: str, tensor: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    if target is torch.float16 and tensor.dtype is not torch.float16:
        largest = float(tensor.abs().amax())
        if largest > FLOAT16_MAX:
            why = f"tensor {name!r} holds {largest:.4g}, more than float16 can; import it as bfloat16"
            raise source_invalid(label, why)
    return tensor.to(target)


class FolderTensors:
    """The tensors of a folder's files under the names that are stored, in their order.

    Raises Refused when a name or a shape is not the configuration's, or when two tensors that it makes one
    are different.
    """

    def __init__(self, label: str, files: TensorFiles, expected: Expected) -> None:
        self._files = files
        self._sources = _settle_ties(label, files, expected.tied)
        if expected.by_name:
            wanted = {name: shape for name, shape in expected.shapes.items() if name not in expected.tied}
            for name, source in sorted(self._sources.items()):
                if not _ignorable(name, expected.tied):
                    _check_place(label, name, files.shapes[source], wanted)
            _check_complete(label, sorted(wanted.keys() - self._sources.keys()))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, source in sorted(self._sources.items()):
            yield name, self._files.get(source)


def _settle_ties(label: str, files: TensorFiles, tied: Mapping[str, str]) -> dict[str, str]:
    """Name as stored -> name in the files, which may hold either of two tied tensors, or both if equal."""
    sources = {name: name for name in files.shapes if name not in tied}
    for name, stored in tied.items():
        if name not in files.shapes:
            continue
        if stored not in sources:
            sources[stored] = name
        elif not torch.equal(files.get(name), files.get(sources[stored])):
            cause = (
                f"config.json makes {name!r} and {stored!r} one tensor, and the files hold two different ones"
            )
            raise source_invalid(label, f"{cause}; set tie_word_embeddings to false in config.json")
    return sources
