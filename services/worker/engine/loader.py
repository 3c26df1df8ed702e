"""From a folder of safetensors to a model on its device, or to a reason why not.

Nothing but local files is read, no code comes from the folder, and no weight may be missing:
transformers would fill it with random numbers and go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from services.worker.engine import attention
from services.worker.engine.config import EngineConfig
from services.worker.engine.errors import EngineError, load_failed, unsupported
from services.worker.engine.fused import fuse
from services.worker.engine.linear import Products, arrange
from services.worker.engine.memory import Shape, cache_blocks, host_available_bytes
from services.worker.engine.support import Unsupported, check_support

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAST_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "arm_bf16", "sve_bf16")
"""CPU features with which products in bfloat16 are faster than in float32."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with the memory planned for it."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    shape: Shape
    blocks: int

    def with_blocks(self, blocks: int) -> LoadedModel:
        """The same model with a KV cache of this size."""
        return replace(self, blocks=blocks)


def load(config: EngineConfig, progress: Callable[[str, float], None]) -> LoadedModel:
    """Raises EngineError."""
    folder = Path(config.model_dir)
    raw = _read_config(folder)
    try:
        check_support(raw)
    except Unsupported as error:
        raise unsupported(error.architecture, error.cause) from error
    device = _device(config.device)
    dtype = _dtype(config.dtype, raw, device)
    shape = _shape(folder, dtype, device)
    blocks = cache_blocks(
        shape,
        available_bytes=_available_bytes(device),
        wanted_bytes=config.kv_cache_bytes,
        sequences_max=config.sequences_max,
        block_tokens=config.block_tokens,
        step_tokens_max=config.step_tokens_max,
        on_device=device.type != "cpu",
    )
    progress("weights", 0.1)
    model = _model(folder, dtype, device)
    progress("layout", 0.7)
    products = Products(model)
    fuse(model, products)
    arrange(model, products)
    return LoadedModel(model, device, dtype, shape, blocks)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise load_failed(f"config.json: {error}") from error
    if not isinstance(raw, dict):
        raise load_failed("config.json holds no object")
    return raw


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise load_failed(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, raw: dict[str, Any], device: torch.device) -> torch.dtype:
    """The configured one; `auto`: the model's, or float32 where the CPU only emulates bfloat16."""
    if name != "auto":
        return DTYPES[name]
    stored = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)
    if device.type == "cpu" and not has_fast_bf16():
        return torch.float32
    return torch.bfloat16 if device.type == "cpu" and stored is torch.float16 else stored


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(features.get(name) for name in FAST_BF16)


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_available_bytes()


def _shape(folder: Path, dtype: torch.dtype, device: torch.device) -> Shape:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        elements = sum(_elements(path) for path in sorted(folder.glob("*.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise load_failed(str(error)) from error
    if not elements:
        raise load_failed("the folder has no *.safetensors")
    if device.type == "cpu" and config.tie_word_embeddings:
        # The head is packed for products, the embedding is not: there are two of them.
        elements += config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    return Shape(
        weight_bytes=elements * dtype.itemsize,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        element_bytes=dtype.itemsize,
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


def _elements(path: Path) -> int:
    with safe_open(path, framework="pt") as tensors:
        return sum(_product(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    attention.register()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise load_failed(str(error)) from error
    if missing := sorted(found["missing_keys"]):
        raise load_failed(f"{len(missing)} weights are missing, {missing[0]} the first")
    try:
        return model.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError as error:
        raise EngineError("MODEL_TOO_LARGE", f"the weights do not fit on {device}: {error}") from error
