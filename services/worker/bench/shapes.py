"""Shapes of models to measure where no weights are at hand: each a config.json, nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    # Meta-Llama-3-8B.
    "llama-3-8b": _LLAMA | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 8192,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # Small enough for a test or a dry run on any machine.
    "tiny": _LLAMA | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # fmt: skip


@contextmanager
def folder(name: str) -> Iterator[Path]:
    """A folder with this shape's config.json, gone afterwards. Raises KeyError."""
    config = SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="tokenloom-shape-") as made:
        (Path(made) / "config.json").write_text(json.dumps(config, indent=1))
        yield Path(made)
