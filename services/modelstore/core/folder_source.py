"""Whether a Hugging Face folder can be imported, decided from its file names and small files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.modelstore.core.facts import check_context
from services.modelstore.core.refusal import Refused, source_invalid
from services.modelstore.core.support import check_config, check_tokenizer_config

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
README = "README.md"
SMALL_FILES = (CONFIG, INDEX, TORCH_INDEX, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, README)
"""Read whole before anything is decided."""
SMALL_FILE_BYTES_MAX = 32 * 1024 * 1024
TEXT_FILES = (CONFIG, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, README, TOKENIZER)
"""All that is looked for beside weights, the configuration first."""
WEIGHTS = ((INDEX, SINGLE), (TORCH_INDEX, TORCH_SINGLE))
"""Names that weights go by, the better ones first: the index of several files, or the only file."""
SHARDS_MAX = 2048
UNKNOWN_HEAD_BYTES = 16
"""Of a file that may be anything, to say what it is."""

_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_OTHER_FORMATS = re.compile(r".*\.(h5|msgpack|onnx|tflite)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9._ +-]{0,63}?)[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """What the conversion of an accepted folder reads."""

    weights: tuple[str, ...]
    """The files that hold them, in order."""
    format: str
    """`safetensors` or `pytorch`."""
    weight_map: Mapping[str, str]
    """Tensor to file, as an index tells it; empty without one."""
    used: tuple[str, ...]
    """Every file whose bytes may change the result."""
    license: str


def inspect(label: str, sizes: Mapping[str, int], small: Mapping[str, bytes]) -> FolderPlan:
    """Accept a folder, or raise Refused: SOURCE_INVALID or MODEL_UNSUPPORTED.

    `sizes` has every file at the top of the folder, `small` the content of those in SMALL_FILES.
    """
    check_text(label, sizes, small)
    kind, weights, weight_map = _weights(label, sizes, small)
    others = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE)
    used = tuple(sorted({*weights, *(name for name in others if name in sizes)}))
    return FolderPlan(weights, kind, weight_map, used, read_license(small.get(README, b"")))


def check_text(label: str, sizes: Mapping[str, int], small: Mapping[str, bytes]) -> None:
    """All that can be refused without the weights. Raises as `inspect`."""
    if CONFIG not in sizes:
        cause = "has no config.json: it is no Hugging Face model folder; give a GGUF file or such a folder"
        raise source_invalid(label, cause)
    config = read_json(label, CONFIG, small)
    check_config(label, config)
    check_context(label, config)
    if TOKENIZER not in sizes:
        raise source_invalid(label, _tokenizer_cause(sizes))
    tokenizer_config = read_json(label, TOKENIZER_CONFIG, small) if TOKENIZER_CONFIG in sizes else {}
    check_tokenizer_config(label, tokenizer_config)
    if GENERATION_CONFIG in sizes:
        read_json(label, GENERATION_CONFIG, small)


def read_json(label: str, name: str, small: Mapping[str, bytes]) -> dict[str, Any]:
    """One of the folder's JSON files. Raises Refused with SOURCE_INVALID when it is no JSON object."""
    try:
        value = json.loads(small[name])
    except (KeyError, RecursionError, ValueError) as error:
        raise source_invalid(label, f"{name} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise source_invalid(label, f"{name} holds no JSON object")
    return value


def read_index(label: str, name: str, small: Mapping[str, bytes]) -> tuple[tuple[str, ...], int]:
    """The files that an index names, and their bytes in all as it tells them (0: it does not).

    Raises Refused with SOURCE_INVALID.
    """
    index = read_json(label, name, small)
    files = tuple(sorted(set(_weight_map(label, name, small).values())))
    if len(files) > SHARDS_MAX:
        raise source_invalid(label, f"{name} names {len(files)} files; at most {SHARDS_MAX}")
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else 0
    return files, size if isinstance(size, int) and size > 0 else 0


def _weight_map(label: str, index: str, small: Mapping[str, bytes]) -> dict[str, str]:
    mapping = read_json(label, index, small).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise source_invalid(label, f"{index} has no weight_map")
    suffix = ".safetensors" if index == INDEX else ".bin"
    for file in mapping.values():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or not file.endswith(suffix):
            raise source_invalid(label, f"{index} names {str(file)[:80]!r}, which is no file name {suffix}")
    return mapping


def _weights(
    label: str, sizes: Mapping[str, int], small: Mapping[str, bytes]
) -> tuple[str, tuple[str, ...], Mapping[str, str]]:
    """Format, files, and which tensor lies where. Safetensors go before checkpoints."""
    if INDEX in sizes:
        return "safetensors", *_indexed(label, INDEX, sizes, small)
    found = tuple(sorted(name for name in sizes if name.endswith(".safetensors")))
    if len(found) > 1:
        raise source_invalid(
            label, f"has {len(found)} safetensors files and no {INDEX}; fetch the folder again"
        )
    if found:
        return "safetensors", found, {}
    if TORCH_INDEX in sizes:
        return "pytorch", *_indexed(label, TORCH_INDEX, sizes, small)
    if TORCH_SINGLE in sizes:
        return "pytorch", (TORCH_SINGLE,), {}
    raise source_invalid(label, _weights_cause(sizes))


def _indexed(
    label: str, index: str, sizes: Mapping[str, int], small: Mapping[str, bytes]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    names, _ = read_index(label, index, small)
    missing = [name for name in names if name not in sizes]
    if missing:
        raise source_invalid(label, f"{index} names {missing[0]}, which is missing; fetch the folder again")
    return names, _weight_map(label, index, small)


def _weights_cause(sizes: Mapping[str, int]) -> str:
    pickles = sorted(name for name in sizes if _PICKLE.fullmatch(name))
    if pickles:
        return (
            f"{pickles[0]} is a pickle by its name, and of those only {TORCH_SINGLE} and the files of "
            f"{TORCH_INDEX} are read; save the model as safetensors"
        )
    others = sorted(name for name in sizes if _OTHER_FORMATS.fullmatch(name))
    if others:
        return f"{others[0]} is not read; save the model as safetensors"
    return "has no weights (*.safetensors)"


def _tokenizer_cause(sizes: Mapping[str, int]) -> str:
    old = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model") if name in sizes]
    seen = f" ({old[0]} alone is not read)" if old else ""
    return f"has no tokenizer.json{seen}; save the tokenizer with transformers' AutoTokenizer.save_pretrained"


def read_license(readme: bytes) -> str:
    """The licence that a model card's front matter states, or empty."""
    text = readme.decode("utf-8", errors="replace")
    if not text.startswith("---"):
        return ""
    match = _LICENSE.search(text.split("\n---", 1)[0])
    return match[1] if match else ""


def safe_name(name: str) -> str:
    """`name` with nothing in it that a path could mean; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:200].lstrip(".")


def refuse_unknown_file(label: str, head: bytes) -> Refused:
    """Why a single file that is no GGUF file is not imported."""
    if head[:2] in (b"PK", b"\x80\x02"):
        cause = (
            "is a PyTorch checkpoint or another archive or pickle: give the folder that holds it, "
            f"with {CONFIG} and {TOKENIZER}"
        )
    elif head[8:9] == b"{":
        cause = f"is a safetensors file alone: give the folder that holds it, with {CONFIG} and {TOKENIZER}"
    else:
        cause = f"begins with {head[:4]!r}, not with b'GGUF': give a GGUF file or a Hugging Face folder"
    return source_invalid(label, cause)
