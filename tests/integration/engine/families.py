"""Tiny random models of each family, large enough to have everything that the family has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 64}},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 20, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma2": {"sliding_window": 20, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma": {},
    "qwen2": {"num_key_value_heads": 6},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def build(family: str, folder: Path, *, seed: int = 7, **overrides: Any) -> Path:
    """Saves a random float32 model of a family and returns its folder."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def random_prompts(count: int, *, vocab_size: int = 211, longest: int = 60, seed: int = 3) -> list[list[int]]:
    """Prompts of mixed lengths, one token the shortest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, longest, *torch.randint(2, longest, (count - 2,), generator=generator).tolist()]
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
