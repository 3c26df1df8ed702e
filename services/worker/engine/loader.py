"""From a folder of safetensors to a model on its device, or to a reason why not.

Nothing but local files is read, no code comes from the folder, and no weight may be missing:
transformers would fill it with random numbers and go on. Random weights there are only when they are
asked for (dummy.py).
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from services.worker.engine import attention, dummy
from services.worker.engine.config import EngineConfig
from services.worker.engine.cpu.cache import suits
from services.worker.engine.cpu.kernels import Kernels, available
from services.worker.engine.errors import EngineError, load_failed, unsupported
from services.worker.engine.fused import fuse, stack
from services.worker.engine.linear import Products, arrange
from services.worker.engine.mapped import MappedFiles
from services.worker.engine.memory import Shape, cache_blocks, host_available_bytes
from services.worker.engine.progress import Tell, WeightsProgress
from services.worker.engine.support import PLAIN_TYPES, Unsupported, check_support

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CAPABILITY_MIN = (8, 0)
"""CUDA compute capability: matrix units for bfloat16."""
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
    kernels: Kernels | None = None
    """Those that the model's layers were arranged for."""
    on_triton: bool = False
    """Whether they were arranged for the kernels of a CUDA device."""

    def with_blocks(self, blocks: int) -> LoadedModel:
        """The same model with a KV cache of this size."""
        return replace(self, blocks=blocks)


def load(config: EngineConfig, progress: Tell) -> LoadedModel:
    """Raises EngineError."""
    folder = Path(config.model_dir)
    raw = _read_config(folder)
    try:
        check_support(raw)
    except Unsupported as error:
        raise unsupported(error.architecture, error.cause) from error
    device = _device(config.device)
    dtype = _dtype(config.dtype, raw, device)
    random = config.load_format == "dummy"
    shape = _shape(folder, random, dtype, device)
    kernels = _kernels(shape, dtype, device)
    held = _held_dtype(raw, dtype, kernels)
    shape = replace(shape, weight_bytes=shape.weight_bytes // dtype.itemsize * held.itemsize)
    blocks = cache_blocks(
        shape,
        available_bytes=_available_bytes(device),
        wanted_bytes=config.kv_cache_bytes,
        sequences_max=config.sequences_max,
        block_tokens=config.block_tokens,
        step_tokens_max=config.step_tokens_max,
        on_device=device.type != "cpu",
    )
    counted = WeightsProgress(progress, shape.weight_bytes)
    model = _random(folder, held, device) if random else _stored(folder, held, device, counted)
    on_triton = _on_triton(device)
    files = None if random or device.type != "cpu" else MappedFiles(folder)

    def packed(size_bytes: int) -> None:
        counted.came(size_bytes)
        if files is not None:
            files.was_read(size_bytes)

    products = Products(model, dtype, kernels, on_triton=on_triton, packed=packed)
    fuse(model, products)
    arrange(model, products)
    if held is not dtype:
        _widen(model, dtype)
    if kernels is not None:
        stack(model, kernels)
    if files is not None:
        files.let_go()
    if device.type == "cuda":
        # What was joined or widened is gone, and the KV cache comes next.
        torch.cuda.empty_cache()
    return LoadedModel(model, device, dtype, shape, blocks, kernels, on_triton)


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


def _kernels(shape: Shape, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Our own for a CPU; None: torch's operators. With our products, torch keeps to one thread.

    Two sets of threads that wait for each other's results would fight for the same cores.
    """
    if device.type != "cpu" or not suits(shape, dtype) or not available():
        return None
    own_products = dtype is torch.float32
    kernels = Kernels(torch.get_num_threads(), beside_openmp=not own_products)
    if own_products:
        torch.set_num_threads(1)
    return kernels


def _on_triton(device: torch.device) -> bool:
    """Whether this device runs our Triton kernels; otherwise torch's operators do their work."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY_MIN


def _held_dtype(raw: dict[str, Any], dtype: torch.dtype, kernels: Kernels | None) -> torch.dtype:
    """In which dtype the weights are held.

    Stored in bfloat16 they stay so where the kernels widen them as they read.
    """
    stored = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")))
    widened = kernels is not None and dtype is torch.float32 and raw.get("model_type") in PLAIN_TYPES
    return stored if widened and stored is torch.bfloat16 else dtype


class _Widened(nn.Module):
    """An embedding that stays as it is stored; the rows that are looked up are widened."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self._embedding = embedding
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self._embedding(ids)
        return rows.to(self._dtype)


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What is left beside the products: norms become `dtype`, the embedding's rows when they are used."""
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(nn.Identity())
    model.to(dtype)
    model.set_input_embeddings(_Widened(embedding, dtype))


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_available_bytes()


def _shape(folder: Path, random: bool, dtype: torch.dtype, device: torch.device) -> Shape:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        files = sorted(folder.glob("*.safetensors"))
        elements = dummy.elements(folder) if random else sum(_elements(path) for path in files)
    except StrictDataclassError as error:
        raise load_failed(f"config.json: {' '.join(str(error).split())}") from error
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


def _stored(
    folder: Path, dtype: torch.dtype, device: torch.device, counted: WeightsProgress
) -> PreTrainedModel:
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
            # Its own refusal names no tensor; ours, below, does.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise load_failed(str(error)) from error
    if missing := sorted(found["missing_keys"]):
        raise load_failed(f"{len(missing)} weights are missing, {missing[0]} the first")
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise load_failed(
            f"{len(mismatched)} weights have another shape than config.json says, {name} the first: "
            f"{list(stored)} is stored, {list(wanted)} is wanted"
        )
    model.eval().requires_grad_(False)
    try:
        if device.type != "cpu":
            _copy(model, device, counted)
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise _no_room(device, error) from error


def _copy(model: nn.Module, device: torch.device, counted: WeightsProgress) -> None:
    """Module by module, the innermost first, so that it can be told how far it is."""
    for module in reversed(list(model.modules())):
        sizes = [p.nbytes for p in module.parameters(recurse=False) if p.device != device]
        module.to(device)
        counted.came(sum(sizes))


def _random(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    attention.register()
    try:
        return dummy.build(folder, dtype, device, attention.IMPLEMENTATION).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise _no_room(device, error) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise load_failed(str(error)) from error


def _no_room(device: torch.device, error: torch.OutOfMemoryError) -> EngineError:
    return EngineError("MODEL_TOO_LARGE", f"the weights do not fit on {device}: {error}")
