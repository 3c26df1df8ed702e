"""The head of a GGUF file: metadata and tensor table, without any tensor's data.

The file is somebody else's: every length in it is checked against the bytes that are there before it is
believed. Vocabularies are counted, not read. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEAD_BYTES_MAX = 64 * 1024 * 1024
"""How much of a file is read for its head: vocabulary, merges and tensor table."""
ENTRIES_MAX = 1 << 20
DIMENSIONS_MAX = 8
DEFAULT_ALIGNMENT = 32

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """The bytes are no whole GGUF head. The message says where they go wrong."""


@dataclass(frozen=True, slots=True)
class Counted:
    """An array that was walked over and not kept."""

    length: int


Value = int | float | bool | str | Counted


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in GGUF's order, the fastest-moving dimension first."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    """Where tensor offsets count from."""

    def text(self, key: str) -> str:
        """A string of the metadata, or empty."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int | None:
        """A whole number of the metadata, or None."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Reader:
    """Reads values one after the other and never past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        self.what = "the header"

    def take(self, size: int) -> bytes:
        end = self.at + size
        if size < 0 or end > len(self._data):
            raise GgufError(f"ends at byte {len(self._data)}, inside {self.what}")
        piece = self._data[self.at : end]
        self.at = end
        return piece

    def scalar(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def count(self, layout: str, largest: int) -> int:
        value = int(self.scalar(layout))
        if value > largest:
            raise GgufError(f"{self.what} claims {value} entries; at most {largest} are possible")
        return value

    def string(self) -> str:
        raw = self.take(self.count("<Q", len(self._data)))
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise GgufError(f"{self.what} has the unknown type {kind}")

    def _array(self) -> Counted:
        kind = self.count("<I", 12)
        length = self.count("<Q", len(self._data))
        if kind in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(length):
                self.take(self.count("<Q", len(self._data)))
        else:
            raise GgufError(f"{self.what} is an array of the unknown type {kind}")
        return Counted(length)


def parse(data: bytes) -> Header:
    """The head in the first bytes of a file. Raises GgufError.

    A head that is longer than `data` looks like a file that ends early: pass all of it, or enough.
    """
    reader = _Reader(data)
    magic = reader.take(4)
    if magic != MAGIC:
        raise GgufError(f"begins with {magic!r}, not with {MAGIC!r}: it is no GGUF file")
    version = reader.count("<I", 1 << 31)
    if version not in VERSIONS:
        raise GgufError(f"is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    reader.what = "the header's counts"
    tensor_count = reader.count("<Q", ENTRIES_MAX)
    metadata_count = reader.count("<Q", ENTRIES_MAX)
    metadata: dict[str, Value] = {}
    for index in range(metadata_count):
        reader.what = f"metadata entry {index + 1} of {metadata_count}"
        key = reader.string()
        reader.what = f"metadata {key[:80]!r}"
        metadata[key] = reader.value(reader.count("<I", 12))
    tensors = tuple(_tensor(reader, index, tensor_count) for index in range(tensor_count))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError(f"has general.alignment {alignment!r}; it must be a whole number from 1")
    return Header(version, metadata, tensors, -(-reader.at // alignment) * alignment)


def _tensor(reader: _Reader, index: int, count: int) -> TensorInfo:
    reader.what = f"tensor entry {index + 1} of {count}"
    name = reader.string()
    reader.what = f"tensor {name[:80]!r}"
    dimensions = reader.count("<I", DIMENSIONS_MAX)
    shape = tuple(int(reader.scalar("<Q")) for _ in range(dimensions))
    return TensorInfo(name, shape, reader.count("<I", 1 << 16), int(reader.scalar("<Q")))


def data_end(header: Header, block_sizes: Mapping[int, tuple[int, int]]) -> tuple[int, str]:
    """The length that the file must have, and the tensor that needs it.

    `block_sizes` maps a tensor type to (elements, bytes) of its blocks. Raises GgufError for a type that
    is not in it or a shape that is no whole number of blocks.
    """
    end, last = header.data_start, ""
    for tensor in header.tensors:
        if tensor.type_id not in block_sizes:
            raise GgufError(f"tensor {tensor.name!r} has the unknown type {tensor.type_id}")
        elements, size = block_sizes[tensor.type_id]
        if not tensor.shape or tensor.shape[0] % elements:
            raise GgufError(
                f"tensor {tensor.name!r} of shape {list(tensor.shape)} is no whole number of blocks"
            )
        tensor_end = header.data_start + tensor.offset + tensor.elements // elements * size
        if tensor_end > end:
            end, last = tensor_end, tensor.name
    return end, last
