"""What a sim engine is started with: one JSON value on its command line."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]


class SimConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pretended model on one pretended device."""

    step_ms: NotNegative = 10.0
    """Time of a step before what its sequences add."""
    sequence_us: NotNegative = 0.0
    """Added for each sequence in the step."""
    prefill_tokens_per_s: Annotated[float, Meta(gt=0)] = 20_000.0
    """Prompt tokens add the time that this speed needs for them."""
    load_s: NotNegative = 0.0
    """From the start of the process until it is ready."""
    sequences_max: Positive = 64
    step_tokens_max: Positive = 512
    block_tokens: Positive = 16
    prefix_cache: bool = True
    total_blocks: Positive = 4096
    context_length: Positive = 8192
    vocab_size: Positive = 512


def encode_sim_config(config: SimConfig) -> str:
    """The value for `--config`."""
    return msgspec.json.encode(config).decode()


def decode_sim_config(text: str) -> SimConfig:
    """Raises ValueError with one line that names the field."""
    try:
        return msgspec.json.decode(text.encode(), type=SimConfig)
    except msgspec.MsgspecError as error:
        raise ValueError(f"sim configuration: {error}") from error
