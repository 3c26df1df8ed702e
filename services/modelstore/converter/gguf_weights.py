"""The tensors of a GGUF file, unpacked to float32 under transformers' names.

The table of names is gguf's, the reordering of rotary heads transformers' own, as its loader applies it
with `GgufConfig(dequantize=True)`; going tensor by tensor keeps one of them in memory, not the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from services.modelstore.core.gguf import HEAD_BYTES_MAX, TensorInfo, parse
from services.modelstore.core.refusal import source_invalid

_PLAIN = {"F32": np.float32, "F16": np.float16}


class GgufTensors:
    """Iterates in the file's order."""

    def __init__(self, label: str, file: Path, model: Any) -> None:
        self._label = label
        self._file = file
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self._file.open("rb") as opened:
            header = parse(opened.read(HEAD_BYTES_MAX))
        data = np.memmap(self._file, mode="r", dtype=np.uint8)
        architecture = header.text("general.architecture")
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._model.config.to_dict())
        names = _names(architecture, self._model)
        for info in header.tensors:
            if info.name not in names:
                raise source_invalid(self._label, f"tensor {info.name!r} is unknown to {architecture!r}")
            unpacked = _unpack(info, data[header.data_start + info.offset :])
            result = processor.process(weights=unpacked, name=info.name)
            yield names[info.name], torch.from_numpy(np.array(result.weights, dtype=np.float32))


def _names(architecture: str, model: Any) -> Mapping[str, str]:
    """GGUF's name -> transformers' name, for every tensor of the model."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        base, _, suffix = name.rpartition(".")
        if (gguf_name := table.get_name(base)) is not None:
            names[f"{gguf_name}.{suffix}"] = name
    return names


def _unpack(info: TensorInfo, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The tensor in float32, in torch's order of dimensions. `data` begins where it begins."""
    kind = gguf.GGMLQuantizationType(info.type_id)
    shape = tuple(reversed(info.shape))
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block_elements * block_bytes
    raw = data[: info.elements // block_elements * block_bytes]
    if kind.name in _PLAIN:
        return raw.view(_PLAIN[kind.name]).reshape(shape).astype(np.float32)
    unpacked: npt.NDArray[np.float32] = gguf.dequantize(raw.reshape(*shape[:-1], row_bytes), kind)
    return unpacked
