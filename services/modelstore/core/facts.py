"""From a model's configuration to what a manifest states: shapes, cache cost, stop tokens, first token.

Takes transformers' resolved configuration (defaults filled in) as plain values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services.modelstore.core.manifest import DTYPE_BYTES
from services.modelstore.core.refusal import Refused, source_invalid

CONTEXT_MAX = 16 * 1024 * 1024
DIMENSION_MAX = 1 << 31

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|end_of_text|>",
)
"""Markers that end a chat turn. One counts only when it is a special token and the template writes it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a configuration that a manifest needs."""

    context_length: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def read_shape(label: str, config: Mapping[str, Any]) -> Shape:
    """Raises Refused with SOURCE_INVALID naming the field that is missing or impossible."""
    heads = _number(label, config, "num_attention_heads")
    layers = _number(label, config, "num_hidden_layers")
    hidden = _number(label, config, "hidden_size")
    kv_heads = _number(label, config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise source_invalid(
            label, f"config.json: num_attention_heads {heads} is no multiple of {kv_heads} KV heads"
        )
    return Shape(
        context_length=_number(label, config, "max_position_embeddings", largest=CONTEXT_MAX),
        vocab_size=_number(label, config, "vocab_size"),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=_number(label, config, "head_dim", max(1, hidden // heads)),
    )


def _number(
    label: str, config: Mapping[str, Any], key: str, default: int | None = None, largest: int = DIMENSION_MAX
) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise source_invalid(
            label, f"config.json: {key} is {value!r}; it must be a whole number, 1 to {largest}"
        )
    return value


def check_context(label: str, stated: Mapping[str, Any]) -> None:
    """Raises Refused with SOURCE_INVALID when config.json leaves the context to its class's default."""
    _number(label, stated, "max_position_embeddings", largest=CONTEXT_MAX)


def check_vocabulary(label: str, last_token: tuple[str, int], vocab_size: int) -> None:
    """Raises Refused with SOURCE_INVALID when text becomes tokens that the model has no embedding of."""
    token, token_id = last_token
    if token_id >= vocab_size:
        raise source_invalid(
            label,
            f"the tokenizer has token {token[:40]!r} with id {token_id}, and the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that belongs to the model",
        )


def check_writer(label: str, wrote: object, reads: str) -> None:
    """Raises Refused with MODEL_UNSUPPORTED for a configuration of a later transformers' major version.

    Between major versions the same field may mean something else; within one, what is new is refused by name.
    """
    if not isinstance(wrote, str) or _major(wrote) <= _major(reads):
        return
    cause = (
        f"config.json was written by transformers {wrote[:40]}, and transformers {reads} reads it here; "
        f"save the model with transformers {_major(reads)}, or use a newer modelstore"
    )
    raise Refused("MODEL_UNSUPPORTED", f"{label}: {cause}", architecture="config.json", cause=cause)


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdecimal() and len(digits) < 6 else 0


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer says about its special tokens."""

    eos_token: str
    """Its text, or empty."""
    special_tokens: Mapping[str, int]
    """Text to id of every special token."""
    chat_template: str
    """Empty when there is none."""
    declared_end_ids: tuple[int, ...] = ()
    """Ends that the source names by id, such as GGUF's eot and eom tokens."""
    first_token_id: int | None = None
    """The id that plain text is given in front, or None."""


def stop_token_ids(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: TokenizerFacts,
    vocab_size: int,
) -> tuple[int, ...]:
    """Every token that ends a generation, in order.

    The union of the configuration's and the generation configuration's end tokens, the tokenizer's own,
    and the markers with which the chat template closes a turn.
    """
    found = set(_ids(config.get("eos_token_id"))) | set(_ids(generation_config.get("eos_token_id")))
    found |= set(tokenizer.declared_end_ids)
    texts = [tokenizer.eos_token, *(text for text in END_OF_TURN if text in tokenizer.chat_template)]
    found |= {tokenizer.special_tokens[text] for text in texts if text in tokenizer.special_tokens}
    return tuple(sorted(i for i in found if 0 <= i < vocab_size))


def bos_token_id(
    tokenizer: TokenizerFacts, tokenizer_config: Mapping[str, Any], vocab_size: int
) -> int | None:
    """The token that goes before plain text: only when the tokenizer really puts one there.

    A model may name a beginning-of-text token and never use it (for SmolLM2 it is the marker that opens
    a turn), so the name alone decides nothing. What tokenizer_config.json says outright wins.
    """
    adds = tokenizer_config.get("add_bos_token")
    token_id = tokenizer.first_token_id
    if adds is True and token_id is None:
        token_id = tokenizer.special_tokens.get(token_text(tokenizer_config.get("bos_token")))
    if adds is False or token_id is None or not 0 <= token_id < vocab_size:
        return None
    return token_id


def token_text(value: object) -> str:
    """A special token's text, which tokenizer_config.json writes as a string or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: object) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [int(v) for v in values if isinstance(v, int) and not isinstance(v, bool)]


def pick_template(jinja: str | None, tokenizer_config: Mapping[str, Any]) -> str:
    """The chat template: the file's, else the configuration's one or the one named `default`; or empty."""
    if jinja is not None:
        return jinja
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
