"""Whether a Hugging Face folder can be imported, decided from its file names and small files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.modelstore.core.refusal import Refused, source_invalid
from services.modelstore.core.support import check_config, check_tokenizer_config

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
README = "README.md"
SMALL_FILES = (CONFIG, INDEX, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, README)
"""Read whole before anything is decided."""
SMALL_FILE_BYTES_MAX = 32 * 1024 * 1024

_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_OTHER_FORMATS = re.compile(r".*\.(h5|msgpack|onnx|tflite)")
_LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9._ +-]{0,63}?)[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """What the conversion of an accepted folder reads."""

    weights: tuple[str, ...]
    """The safetensors files, in order."""
    used: tuple[str, ...]
    """Every file whose bytes may change the result."""
    license: str


def inspect(label: str, sizes: Mapping[str, int], small: Mapping[str, bytes]) -> FolderPlan:
    """Accept a folder, or raise Refused: SOURCE_INVALID or MODEL_UNSUPPORTED.

    `sizes` has every file at the top of the folder, `small` the content of those in SMALL_FILES.
    """
    if CONFIG not in sizes:
        cause = "has no config.json: it is no Hugging Face model folder; give a GGUF file or such a folder"
        raise source_invalid(label, cause)
    check_config(label, read_json(label, CONFIG, small))
    if TOKENIZER not in sizes:
        raise source_invalid(label, _tokenizer_cause(sizes))
    tokenizer_config = read_json(label, TOKENIZER_CONFIG, small) if TOKENIZER_CONFIG in sizes else {}
    check_tokenizer_config(label, tokenizer_config)
    if GENERATION_CONFIG in sizes:
        read_json(label, GENERATION_CONFIG, small)
    weights = _weights(label, sizes, small)
    others = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE)
    used = tuple(sorted({*weights, *(name for name in others if name in sizes)}))
    return FolderPlan(weights, used, read_license(small.get(README, b"")))


def read_json(label: str, name: str, small: Mapping[str, bytes]) -> dict[str, Any]:
    """One of the folder's JSON files. Raises Refused with SOURCE_INVALID when it is no JSON object."""
    try:
        value = json.loads(small[name])
    except (KeyError, ValueError) as error:
        raise source_invalid(label, f"{name} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise source_invalid(label, f"{name} holds no JSON object")
    return value


def _weights(label: str, sizes: Mapping[str, int], small: Mapping[str, bytes]) -> tuple[str, ...]:
    if INDEX in sizes:
        mapping = read_json(label, INDEX, small).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise source_invalid(label, f"{INDEX} has no weight_map")
        names = sorted({str(name) for name in mapping.values()})
        missing = [name for name in names if name not in sizes]
        if missing:
            raise source_invalid(
                label, f"{INDEX} names {missing[0]}, which is missing; fetch the folder again"
            )
        return tuple(names)
    found = tuple(sorted(name for name in sizes if name.endswith(".safetensors")))
    if len(found) > 1:
        raise source_invalid(
            label, f"has {len(found)} safetensors files and no {INDEX}; fetch the folder again"
        )
    if not found:
        raise source_invalid(label, _weights_cause(sizes))
    return found


def _weights_cause(sizes: Mapping[str, int]) -> str:
    pickles = sorted(name for name in sizes if _PICKLE.fullmatch(name))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which runs code when it is read and is never loaded; "
            "save the model as safetensors"
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


def check_safetensors(label: str, name: str, head: bytes, size_bytes: int) -> int:
    """The number of tensors of a safetensors file, from its header.

    `head` holds the length field and the header, or the whole file when that is shorter. Raises Refused
    with SOURCE_INVALID when the header or the data after it is cut off or malformed.
    """
    broken = f"{name} is cut off or no safetensors file: "
    if len(head) < 8:
        raise source_invalid(label, f"{broken}it has {size_bytes} bytes; fetch it again")
    length = int.from_bytes(head[:8], "little")
    if length > size_bytes - 8:
        raise source_invalid(
            label, f"{broken}its header needs {length} bytes, the file has {size_bytes}; fetch it again"
        )
    try:
        header = json.loads(head[8 : 8 + length])
        ends = [int(t["data_offsets"][1]) for key, t in header.items() if key != "__metadata__"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise source_invalid(label, f"{broken}its header is not readable ({error})") from None
    needed = 8 + length + max(ends, default=0)
    if needed != size_bytes:
        raise source_invalid(
            label, f"{broken}its tensors need {needed} bytes, the file has {size_bytes}; fetch it again"
        )
    return len(ends)


def refuse_unknown_file(label: str, head: bytes) -> Refused:
    """Why a single file that is no GGUF file is not imported."""
    if head[:2] in (b"PK", b"\x80\x02"):
        cause = (
            "is a PyTorch checkpoint or another pickle, which runs code when it is read and is never loaded"
        )
        return source_invalid(label, f"{cause}; import a folder with safetensors or a GGUF file")
    return source_invalid(
        label, f"begins with {head[:4]!r}, not with b'GGUF': give a GGUF file or a Hugging Face folder"
    )
