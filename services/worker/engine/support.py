"""Which models the engine runs exactly, decided by name from config.json alone.

The batch is flattened and attention is ours, so a layer that mixes tokens in any other way, and a RoPE
whose frequencies depend on what else is in the batch, would give wrong tokens without an error. What is
not known to be right is refused. Knows neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
"""`model_type` of families that are compared with transformers' own generation in the tests."""

PLAIN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""`model_type` of the families that have layers of the plain shape (fused.py) alone."""

ROPE_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE types whose frequencies are the same for every batch."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class Unsupported(Exception):
    """The engine cannot run this model exactly. `cause` is one line."""

    def __init__(self, architecture: str, cause: str) -> None:
        super().__init__(f"{architecture}: {cause}")
        self.architecture = architecture
        self.cause = cause


def check_support(config: Mapping[str, Any]) -> None:
    """Raises Unsupported for a config.json that names anything the engine does not know."""
    architecture = _architecture(config)
    for cause in _causes(config):
        raise Unsupported(architecture, cause)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type") or "unknown"]
    return str(names[0])


def _causes(config: Mapping[str, Any]) -> Iterator[str]:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        yield f"model type {model_type!r} is not among {', '.join(sorted(FAMILIES))}"
    architecture = _architecture(config)
    if not architecture.endswith("ForCausalLM") and architecture != model_type:
        yield "it is no decoder for text generation (…ForCausalLM)"
    if config.get("quantization_config"):
        yield "its weights are quantised; import them dequantised"
    if config.get("use_bidirectional_attention"):
        yield "its attention is bidirectional"
    for layer_type in config.get("layer_types") or ():
        if layer_type not in LAYER_TYPES:
            yield f"layer type {layer_type!r} is not attention over the whole or a sliding window"
    for rope_type in _rope_types(config):
        if rope_type not in ROPE_FIXED:
            yield f"RoPE type {rope_type!r} depends on the lengths in the batch"


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """All RoPE types named, in today's spelling and in the older ones."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        nested = [value for value in found.values() if isinstance(value, Mapping)]
        for parameters in nested or [found]:
            yield str(parameters.get("rope_type") or parameters.get("type") or "default")
