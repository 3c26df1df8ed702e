"""Looks at a source before anything is converted: its head, its small files, its tensor tables.

Everything that can be refused without torch is refused here, in milliseconds. Blocks: call it in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.modelstore.core import folder_source, gguf_source
from services.modelstore.core.gguf import HEAD_BYTES_MAX, MAGIC
from services.modelstore.core.gguf_source import GGUF_NAME
from services.modelstore.core.ports import Source, SourceFile, Sources
from services.modelstore.core.refusal import source_invalid

SAFETENSORS_HEAD_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Inspected:
    """A source that may be converted."""

    kind: str
    label: str
    files: tuple[SourceFile, ...]
    """Every file whose bytes may change the result."""
    license: str
    options: Mapping[str, str]
    provenance: Mapping[str, str]


class Inspector:
    """Decides about sources; `block_sizes` and `type_names` are GGUF's tensor types."""

    def __init__(
        self,
        sources: Sources,
        block_sizes: Mapping[int, tuple[int, int]],
        type_names: Mapping[int, str],
    ) -> None:
        self.sources = sources
        self._block_sizes = block_sizes
        self._type_names = type_names

    def inspect(self, path: str) -> Inspected:
        """Raises Refused: SOURCE_NOT_FOUND, SOURCE_INVALID, MODEL_UNSUPPORTED, PERMISSION_DENIED."""
        source = self.sources.open(path)
        return self._folder(source) if source.is_folder else self._file(source)

    def stage(self, inspected: Inspected, folder: Path) -> None:
        """Make a folder in which the converter finds the source's files and no others."""
        folder.mkdir()
        for file in inspected.files:
            name = GGUF_NAME if inspected.kind == "gguf" else file.path
            (folder / name).symlink_to(file.location)

    def check_unchanged(self, inspected: Inspected) -> None:
        """Raises Refused when a file is no longer the one that was looked at and hashed."""
        for file in inspected.files:
            if self.sources.changed(file):
                raise source_invalid(
                    inspected.label, f"{file.path} changed while it was imported; import it again"
                )

    def _file(self, source: Source) -> Inspected:
        file = source.files[0]
        magic = self.sources.head(file, len(MAGIC))
        if magic != MAGIC:
            raise folder_source.refuse_unknown_file(source.label, magic)
        head = self.sources.head(file, HEAD_BYTES_MAX)
        plan = gguf_source.inspect(source.label, head, file.size_bytes, self._block_sizes, self._type_names)
        options = {
            "split": plan.split,
            "add_bos": "true" if plan.add_bos else "false",
            "end_ids": json.dumps(plan.end_ids),
        }
        provenance = {"format": f"gguf {plan.quantization}"}
        return Inspected("gguf", source.label, source.files, plan.license, options, provenance)

    def _folder(self, source: Source) -> Inspected:
        sizes = {file.path: file.size_bytes for file in source.files}
        plan = folder_source.inspect(source.label, sizes, self._small_files(source))
        used = tuple(file for file in source.files if file.path in plan.used)
        for file in used:
            if file.path in plan.weights:
                self._check_weights(source.label, file)
        return Inspected("folder", source.label, used, plan.license, {}, {"format": "safetensors"})

    def _small_files(self, source: Source) -> dict[str, bytes]:
        small = {}
        for name in folder_source.SMALL_FILES:
            file = source.file(name)
            if file is None:
                continue
            if file.size_bytes > folder_source.SMALL_FILE_BYTES_MAX:
                cause = f"{name} has {file.size_bytes} bytes; at most {folder_source.SMALL_FILE_BYTES_MAX}"
                raise source_invalid(source.label, cause)
            small[name] = self.sources.head(file, file.size_bytes)
        return small

    def _check_weights(self, label: str, file: SourceFile) -> None:
        length = int.from_bytes(self.sources.head(file, 8), "little")
        if length > SAFETENSORS_HEAD_BYTES_MAX and length <= file.size_bytes:
            raise source_invalid(
                label, f"{file.path} has a header of {length} bytes; at most {SAFETENSORS_HEAD_BYTES_MAX}"
            )
        head = self.sources.head(file, 8 + min(length, SAFETENSORS_HEAD_BYTES_MAX))
        folder_source.check_safetensors(label, file.path, head, file.size_bytes)
