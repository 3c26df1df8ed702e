"""The head of a safetensors file: which tensors it holds, checked against its size and against an index.

The file is somebody else's: nothing in its header is believed that the bytes there do not bear out.
Layout: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

from services.modelstore.core.refusal import source_invalid

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an element; what is not here packs several into a byte, and its sizes are not checked."""


def check_safetensors(label: str, name: str, head: bytes, size_bytes: int) -> frozenset[str]:
    """The tensors of a safetensors file, from its header.

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
        header.pop("__metadata__", None)
        spans = {key: _span(tensor) for key, tensor in header.items()}
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise source_invalid(label, f"{broken}its header is not readable ({error})") from None
    needed = 8 + length + max((end for _, end in spans.values()), default=0)
    if needed != size_bytes:
        raise source_invalid(
            label, f"{broken}its tensors need {needed} bytes, the file has {size_bytes}; fetch it again"
        )
    _check_layout(label, name, header, spans)
    return frozenset(spans)


def _span(tensor: Mapping[str, Any]) -> tuple[int, int]:
    start, end = tensor["data_offsets"]
    return int(start), int(end)


def _check_layout(
    label: str, name: str, header: Mapping[str, Any], spans: Mapping[str, tuple[int, int]]
) -> None:
    """One tensor after the other, without a gap, each as long as its shape says."""
    at = 0
    for key, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at or end < start:
            cause = f"tensor {key[:160]!r} lies at bytes {start} to {end}, and the one before it ends at {at}"
            raise source_invalid(label, f"{name}: {cause}; fetch it again")
        at = end
        shape, dtype = header[key].get("shape"), header[key].get("dtype")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise source_invalid(label, f"{name}: tensor {key[:160]!r} has the shape {str(shape)[:80]}")
        size = DTYPE_BYTES.get(str(dtype))
        if size is not None and prod(shape) * size != end - start:
            cause = f"of shape {shape} and type {dtype} has {end - start} bytes, not {prod(shape) * size}"
            raise source_invalid(label, f"{name}: tensor {key[:160]!r} {cause}; fetch it again")


def check_index(
    label: str, index: str, weight_map: Mapping[str, str], held: Mapping[str, frozenset[str]]
) -> None:
    """Every tensor of an index lies in its file, and none in two. `held` has each file's tensors.

    Raises Refused with SOURCE_INVALID.
    """
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            cause = f"{index} places tensor {tensor[:160]!r} in {file}, which does not hold it"
            raise source_invalid(label, f"{cause}; fetch the folder again")
    seen: dict[str, str] = {}
    for file in sorted(held):
        for tensor in sorted(held[file]):
            if tensor in seen:
                cause = f"tensor {tensor[:160]!r} lies in {seen[tensor]} and again in {file}"
                raise source_invalid(label, f"{cause}; fetch the folder again")
            seen[tensor] = file
