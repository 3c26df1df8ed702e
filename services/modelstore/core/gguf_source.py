"""Whether a GGUF file can be imported without losing anything, decided from its head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from services.modelstore.core.facts import CONTEXT_MAX
from services.modelstore.core.gguf import Counted, GgufError, Header, data_end, parse
from services.modelstore.core.refusal import Refused, source_invalid, unsupported
from services.modelstore.core.support import check_gguf_architecture

GGUF_NAME = "model.gguf"
"""What a GGUF file is called in a conversion's source folder."""
EMBEDDING = "token_embd.weight"
REFETCH = "fetch the file again"
USE_FOLDER = "import the model's Hugging Face folder"

PRE_TOKENIZERS: Mapping[str, str] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "tekken"), "known"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "known"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "digits"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), "bytes"),
}
"""How a byte-level vocabulary splits text before its merges: `known` to transformers' conversion,
`digits` one by one and then by bytes, or by `bytes` only. Another split would give other tokens."""


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """What the conversion of an accepted file needs."""

    model_type: str
    split: str
    """A value of PRE_TOKENIZERS, or empty for a SentencePiece vocabulary."""
    quantization: str
    """The most frequent tensor type, e.g. `Q4_1`."""
    license: str
    end_ids: tuple[int, ...]
    add_bos: bool


def inspect(
    label: str,
    head: bytes,
    size_bytes: int,
    block_sizes: Mapping[int, tuple[int, int]],
    type_names: Mapping[int, str],
) -> GgufPlan:
    """Accept a file by its head, or raise Refused: SOURCE_INVALID or MODEL_UNSUPPORTED.

    `head` holds the whole head, or the whole file when that is shorter.
    """
    try:
        header = parse(head)
        needed, last = data_end(header, block_sizes)
    except GgufError as error:
        raise source_invalid(label, f"{error}; {REFETCH}") from None
    if needed > size_bytes:
        cause = f"is cut off: tensor {last!r} ends at byte {needed}, the file has {size_bytes}; {REFETCH}"
        raise source_invalid(label, cause)
    if not header.tensors:
        raise source_invalid(label, "holds no tensors, so it is a vocabulary and no model")
    return _plan(label, header, type_names)


def _plan(label: str, header: Header, type_names: Mapping[int, str]) -> GgufPlan:
    architecture = header.text("general.architecture")
    if not architecture:
        raise source_invalid(label, "has no general.architecture; it is no language model")
    model_type = check_gguf_architecture(label, architecture)
    _check_positions(label, header, architecture)
    _check_lengths(label, header, architecture)
    split = _check_tokenizer(label, header)
    types: Counter[str] = Counter()
    for tensor in header.tensors:
        types[type_names.get(tensor.type_id, str(tensor.type_id))] += tensor.elements
    ends = (header.number(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return GgufPlan(
        model_type=model_type,
        split=split,
        quantization=max(sorted(types), key=lambda name: types[name]),
        license=header.text("general.license"),
        end_ids=tuple(sorted({i for i in ends if i is not None})),
        add_bos=_adds_bos(header),
    )


def _check_positions(label: str, header: Header, architecture: str) -> None:
    """What the conversion does not carry over must not be there."""
    cause = ""
    scaling = header.text(f"{architecture}.rope.scaling.type")
    if scaling not in ("", "none"):
        cause = f"it states rotary scaling ({architecture}.rope.scaling.type = {scaling!r})"
    elif any(tensor.name.startswith("rope_freqs") for tensor in header.tensors):
        cause = "it holds rotary frequency factors (tensor rope_freqs.weight)"
    elif header.number(f"{architecture}.attention.sliding_window"):
        cause = f"it states a sliding window ({architecture}.attention.sliding_window)"
    elif header.number(f"{architecture}.expert_count"):
        cause = "it is a mixture of experts"
    if cause:
        why = f"{cause}, which the conversion from GGUF does not carry; {USE_FOLDER}"
        raise unsupported(label, f"GGUF architecture {architecture!r}", why)


def _check_lengths(label: str, header: Header, architecture: str) -> None:
    """Context and vocabulary are stated, and what is stated fits the tensors."""
    key = f"{architecture}.context_length"
    if not 1 <= (header.number(key) or 0) <= CONTEXT_MAX:
        stated = header.metadata.get(key)
        raise source_invalid(label, f"{key} is {stated!r}; it must be a whole number, 1 to {CONTEXT_MAX}")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    embedding = next((tensor for tensor in header.tensors if tensor.name == EMBEDDING), None)
    if isinstance(tokens, Counted) and embedding is not None and tokens.length > embedding.shape[-1]:
        cause = f"its tokenizer has {tokens.length} tokens, and {EMBEDDING} has {embedding.shape[-1]} rows"
        raise source_invalid(label, f"{cause}: they are of different models; fetch the file again")


def _check_tokenizer(label: str, header: Header) -> str:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Counted) or tokens.length == 0:
        raise source_invalid(label, "has no tokenizer (tokenizer.ggml.tokens); use a file that holds one")
    model = header.text("tokenizer.ggml.model")
    if model == "llama":
        return ""
    if model != "gpt2":
        cause = f"tokenizer.ggml.model {model!r} is not converted; {USE_FOLDER}"
        raise Refused("MODEL_UNSUPPORTED", f"{label}: {cause}", architecture="tokenizer", cause=cause)
    split = header.text("tokenizer.ggml.pre")
    if split not in PRE_TOKENIZERS:
        cause = f"tokenizer.ggml.pre {split!r} splits text in a way that is not known here; {USE_FOLDER}"
        raise Refused("MODEL_UNSUPPORTED", f"{label}: {cause}", architecture="tokenizer", cause=cause)
    return PRE_TOKENIZERS[split]


def _adds_bos(header: Header) -> bool:
    """llama.cpp's rule: as the file says; unsaid, SentencePiece vocabularies and Llama 3's get one."""
    stated = header.metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(stated, bool):
        return stated
    return header.text("tokenizer.ggml.model") == "llama" or header.text("tokenizer.ggml.pre") in (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "tekken",
    )
