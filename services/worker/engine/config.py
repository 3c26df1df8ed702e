"""What an engine process is started with: one JSON value on its command line.

    python -m services.worker.engine --fd N --config '{"model_dir": "/cache/blobs/…", "device": "cpu"}'

`N` is an inherited, connected UNIX stream socket that speaks `services.worker.protocol`. The front
writes this configuration, the engine reads it; neither torch nor grpc is imported here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one device. Every number has a default that suits a small model on a CPU."""

    model_dir: str
    """A folder with config.json and *.safetensors (and model.safetensors.index.json when sharded)."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights of the shape that config.json names, without any other file; vLLM's name."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: the first CUDA device if there is one, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is the dtype that config.json names; float32 on a CPU that only emulates that one."""
    kv_cache_bytes: NotNegative = 0
    """Bytes of the KV cache; 0: enough for `sequences_max` whole contexts, within a share of what is free."""
    sequences_max: Positive = 64
    """Sequences that run at once; further ones wait in the engine."""
    waiting_max: NotNegative = 4096
    """Sequences that may wait for a place; a further one is answered at once with finish `error`."""
    step_tokens_max: Positive = 512
    """Tokens that one step may compute: all decodes first, then chunks of prompts."""
    itl_max_ms: NotNegative = 0
    """Prompts are cut so that a step which also decodes takes about this long at most; 0: no bound."""
    block_tokens: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Tokens in one block of the KV cache."""
    prefix_cache: bool = True
    """Whether a prompt finds blocks of the KV cache that hold its beginning already."""
    pipeline_depth: Annotated[int, Meta(ge=0, le=2)] = 0
    """2: the next step is prepared while the present one is computed. 0: 2 on a GPU, 1 on a CPU."""
    threads: NotNegative = 0
    """CPU threads for the kernels and torch; 0: as many as this process may use."""


class ConfigError(ValueError):
    """The configuration is no valid JSON, or a field is missing, unknown or out of bounds."""


def encode_config(config: EngineConfig) -> str:
    """The value for `--config`."""
    return msgspec.json.encode(config).decode()


def decode_config(text: str) -> EngineConfig:
    """Raises ConfigError with one line that names the field."""
    try:
        config = msgspec.json.decode(text.encode(), type=EngineConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"engine configuration: {error}") from error
    if config.step_tokens_max < config.sequences_max:
        raise ConfigError(
            f"step_tokens_max ({config.step_tokens_max}) must be at least sequences_max "
            f"({config.sequences_max}): each running sequence takes one token of a step"
        )
    return config
