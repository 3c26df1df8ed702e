"""Small values that tests begin with."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from services.modelstore.core.manifest import Facts, File, Manifest, digest_of, make_manifest

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 300,
    "eos_token_id": 2,
}


def facts(**changes: Any) -> Facts:
    """Facts of a small model."""
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "bfloat16",
        "context_length": 512,
        "vocab_size": 300,
        "parameters": 1000,
        "weight_bytes": 2000,
        "kv_bytes_per_token": 256,
        "has_chat_template": True,
        "stop_token_ids": (2, 7),
        "bos_token_id": 1,
        "license": "apache-2.0",
        "checked_with": {"transformers": "5"},
    }
    return Facts(**(values | changes))


def manifest(name: str = "tiny", content: bytes = b"{}", **changes: Any) -> Manifest:
    """A manifest of one file; other content makes another version."""
    file = File("config.json", digest_of(content), len(content))
    return make_manifest(name, facts(**changes), [file], {"format": "test"})


F32, Q4_1 = 0, 3
BLOCK_SIZES = {F32: (1, 4), Q4_1: (32, 20)}
TYPE_NAMES = {F32: "F32", Q4_1: "Q4_1"}

GGUF_METADATA: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.license": "apache-2.0",
    "llama.context_length": 512,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 3],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
}

Tensor = tuple[str, Sequence[int], int]


def gguf_file(
    metadata: Mapping[str, Any] = GGUF_METADATA, tensors: Sequence[Tensor] = (("w", (32, 4), Q4_1),)
) -> bytes:
    """A GGUF file, written by hand: what it says is what the test says."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_string(key), _value(value)]
    offset = 0
    for name, shape, kind in tensors:
        elements, size = BLOCK_SIZES[kind]
        count = 1
        for dimension in shape:
            count *= dimension
        out += [
            _string(name),
            struct.pack(f"<I{len(shape)}Q", len(shape), *shape),
            struct.pack("<IQ", kind, offset),
        ]
        offset += count // elements * size
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + bytes(offset)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise AssertionError(f"no GGUF type for {value!r}")


def safetensors_file(tensors: Mapping[str, int]) -> bytes:
    """A safetensors file of float32 vectors of these lengths, all zero."""
    header, end = {}, 0
    for name, count in tensors.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)
