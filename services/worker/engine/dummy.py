"""A model of a configuration with random weights, made where it will run.

For benchmarks of shapes whose weights are not at hand: neither files nor the host's memory hold a second
copy. The same seed gives the same weights on the same kind of device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SEED = 0


def elements(folder: Path) -> int:
    """Elements of all weights, one that is used twice counted once. Raises OSError, ValueError, KeyError."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(folder))
    return sum(weight.numel() for weight in model.parameters())


def build(
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None, seed: int = SEED
) -> PreTrainedModel:
    """Reads nothing but config.json. `attention` None: transformers' own choice.

    The family draws its weights as if it were to be trained. They are never on the meta device, so buffers
    that no file holds, such as RoPE's frequencies, are computed like those of a model that is loaded.
    """
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(folder), dtype=dtype, **chosen)
    return model


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
