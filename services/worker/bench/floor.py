"""The least time that a machine needs for a step of a model, term by term, from bytes and operations alone.

Each term takes the longer of its bytes at the memory's speed and its operations at the units' speed; the
terms follow each other. Weights are read once a step. `activations` says that every product reads its
input from memory and writes its output once, the gated product of the MLP as one output: a machine whose
cache holds them may be that much faster. Norms, rotation and the draw itself cost nothing here.
Multiplying and adding are two operations. Pure: no torch, no machine is asked for anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenloom.bench.stats import Floor, Level, Term

DENSE_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""`model_type` of the families whose layers are attention and a gated MLP of three products."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device can do at most, as measured on it rather than as it is advertised."""

    bytes_per_s: float
    flops: float
    """Operations per second of products in the model's dtype."""


MACHINES = {"NVIDIA H100 80GB HBM3": Machine(3.0e12, 8.0e14)}
"""By the name that the driver gives; operations in bfloat16 or float16."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the work of a step depends on. `window` 0: every layer attends to the whole context."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    element_bytes: int
    window: int = 0

    @property
    def products(self) -> int:
        """Elements of the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def handed_on(self) -> int:
        """Elements that one token's products of one layer read and write."""
        into = 3 * self.hidden + self.heads * self.head_dim + self.intermediate
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim + self.hidden + self.intermediate
        return into + rows


def dimensions(config: Mapping[str, Any], element_bytes: int) -> Dimensions | None:
    """Of a config.json; None for a family whose work is not counted here."""
    if config.get("model_type") not in DENSE_TYPES:
        return None
    heads = int(config["num_attention_heads"])
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    return Dimensions(
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        intermediate=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        element_bytes=element_bytes,
        window=int(config.get("sliding_window") or 0) if windowed else 0,
    )


def machine(device_name: str, element_bytes: int, bytes_per_s: float, flops: float) -> Machine | None:
    """What was given (0: nothing was), and for the rest what is known of this device; None: too little."""
    known = MACHINES.get(device_name) if element_bytes == 2 else None
    bytes_per_s = bytes_per_s or (known.bytes_per_s if known else 0.0)
    flops = flops or (known.flops if known else 0.0)
    return Machine(bytes_per_s, flops) if bytes_per_s and flops else None


def decode_step(size: Dimensions, device: Machine, batch: float, context: float) -> Floor:
    """One token of each of `batch` sequences that attend to `context` tokens each, the new one included."""
    seen = min(context, size.window) if size.window else context
    work = _work(size, tokens=batch, answers=batch, kv_tokens=batch * (seen + 1), pairs=batch * seen)
    return _floor(device, batch=batch, context=context, work=work)


def prefill(size: Dimensions, device: Machine, prompts: float, prompt_tokens: float) -> Floor:
    """Whole prompts, computed together; each gives the logits of its last token."""
    tokens = prompts * prompt_tokens
    reach = min(prompt_tokens, size.window) if size.window else prompt_tokens
    # A token sees itself and what is before it, at most `reach` of them.
    pairs = prompts * (reach * (reach + 1) / 2 + (prompt_tokens - reach) * reach)
    work = _work(size, tokens=tokens, answers=prompts, kv_tokens=2 * tokens, pairs=pairs)
    return _floor(device, batch=prompts, context=prompt_tokens, work=work)


def _work(
    size: Dimensions, *, tokens: float, answers: float, kv_tokens: float, pairs: float
) -> dict[str, tuple[float, float]]:
    """Bytes and operations of each term. `answers`: tokens that are drawn.

    `kv_tokens`: keys and values read and written, in tokens; `pairs`: of tokens, one attending to the other.
    """
    products = size.layers * size.products
    kv_token_bytes = 2 * size.layers * size.kv_heads * size.head_dim * size.element_bytes
    attended = 4 * size.layers * size.heads * size.head_dim
    return {
        "weights": (products * size.element_bytes, 2 * products * tokens),
        "attention": (kv_token_bytes * kv_tokens, attended * pairs),
        "head": _head(size, answers),
        "activations": (size.layers * size.handed_on * size.element_bytes * tokens, 0.0),
    }


def workload_s(
    size: Dimensions, device: Machine, requests: int, batch: int, lengths: tuple[int, int]
) -> float:
    """The least time of `requests` answers, `batch` at once: every prompt, then the steps of all others.

    `lengths`: tokens of a prompt and of an answer. The prompt's step draws the answer's first token.
    """
    prompt_tokens, output_tokens = lengths
    batch = min(batch, requests)
    first_ms = prefill(size, device, requests, prompt_tokens).step_ms
    steps_ms = sum(
        decode_step(size, device, batch, prompt_tokens + drawn).step_ms for drawn in range(1, output_tokens)
    )
    return (first_ms + steps_ms * requests / batch) / 1e3


def beside(level: Level, size: Dimensions, device: Machine, lengths: tuple[int, int] | None) -> Level:
    """The level with its floors. `lengths` as for `workload_s`; None where requests differ."""
    steps = level.steps
    if steps is None:
        return level
    if steps.decode_step_ms is not None:
        floor = decode_step(size, device, steps.decode_sequences_mean, steps.decode_context_mean)
        steps = msgspec.structs.replace(steps, decode_floor=floor)
    if (only := steps.decode_only) is not None and only.steps:
        floor = decode_step(size, device, only.batch, only.context_mean)
        steps = msgspec.structs.replace(steps, decode_only=msgspec.structs.replace(only, floor=floor))
    if lengths is None:
        return msgspec.structs.replace(level, steps=steps)
    least_ms = prefill(size, device, level.num_requests, lengths[0]).step_ms
    steps = msgspec.structs.replace(
        steps, prefill_floor_tokens_per_s=1e3 * level.num_requests * lengths[0] / least_ms
    )
    floor_s = workload_s(size, device, level.num_requests, level.max_concurrency, lengths)
    return msgspec.structs.replace(level, steps=steps, floor_s=floor_s)


def _head(size: Dimensions, rows: float) -> tuple[float, float]:
    """The matrix read; the rows' logits written, and read once to draw from."""
    elements = size.hidden * size.vocab + rows * (size.hidden + 2 * size.vocab)
    return elements * size.element_bytes, 2 * size.hidden * size.vocab * rows


def _floor(device: Machine, batch: float, context: float, work: dict[str, tuple[float, float]]) -> Floor:
    terms = {
        name: Term(bytes, flops, 1e3 * max(bytes / device.bytes_per_s, flops / device.flops))
        for name, (bytes, flops) in work.items()
    }
    return Floor(batch=batch, context=context, step_ms=sum(term.ms for term in terms.values()), terms=terms)
