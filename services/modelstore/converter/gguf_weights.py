"""The tensors of a GGUF file, unpacked to float32 under transformers' names.

The table of names and the reordering of rotary heads are transformers' own, as its loader applies them
with `GgufConfig(dequantize=True)`; going tensor by tensor keeps one of them in memory, not the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from services.modelstore.core.refusal import source_invalid


class GgufTensors:
    """Iterates in the file's order."""

    def __init__(self, label: str, file: Path, model: Any) -> None:
        self._label = label
        self._file = file
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        reader = gguf.GGUFReader(self._file)
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._model.config.to_dict())
        names = get_gguf_hf_weights_map(self._model, processor)
        for tensor in reader.tensors:
            if tensor.name not in names:
                raise source_invalid(self._label, f"tensor {tensor.name!r} is unknown to {architecture!r}")
            unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(
                weights=unpacked, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            yield names[result.name], torch.from_numpy(np.array(result.weights, dtype=np.float32))
