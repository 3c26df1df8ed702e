"""Looks at a source before anything is converted: its head, its small files, its tensor tables.

Everything that can be refused without torch is refused here, in milliseconds. Blocks: call it in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from services.modelstore.core import folder_source, gguf_source
from services.modelstore.core.gguf import HEAD_BYTES_MAX, MAGIC
from services.modelstore.core.gguf_source import GGUF_NAME
from services.modelstore.core.ports import Source, SourceFile, Sources
from services.modelstore.core.refusal import source_invalid
from services.modelstore.core.safetensors import check_index, check_safetensors

SAFETENSORS_HEAD_BYTES_MAX = 64 * 1024 * 1024
ZIP_MAGIC = b"PK"


@dataclass(frozen=True, slots=True)
class Inspected:
    """A source that may be converted."""

    kind: str
    label: str
    is_file: bool
    """Whether the source is one file, not a folder."""
    files: tuple[SourceFile, ...]
    """Every file whose bytes may change the result."""
    license: str
    options: Mapping[str, str]
    provenance: Mapping[str, str]

    def staged(self, file: SourceFile) -> str:
        """What the converter finds it as: a single file's own name means nothing."""
        return GGUF_NAME if self.is_file else file.path


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
        return self._inspect(self.sources.open(path))

    def inspect_fetched(self, fetched: Sources, path: str, label: str) -> Inspected:
        """As `inspect`, for files that were brought here; `label` says where from."""
        return self._inspect(replace(fetched.open(path), label=label))

    def _inspect(self, source: Source) -> Inspected:
        return self._folder(source) if source.is_folder else self._file(source)

    def stage(self, inspected: Inspected, folder: Path) -> None:
        """Make a folder in which the converter finds the source's files and no others."""
        folder.mkdir()
        for file in inspected.files:
            (folder / inspected.staged(file)).symlink_to(file.location)

    def check_unchanged(self, inspected: Inspected) -> None:
        """Raises Refused when a file is no longer the one that was looked at and hashed."""
        for file in inspected.files:
            if self.sources.changed(file):
                raise source_invalid(
                    inspected.label, f"{file.path} changed while it was imported; import it again"
                )

    def _file(self, source: Source) -> Inspected:
        file = source.files[0]
        magic = self.sources.head(file, folder_source.UNKNOWN_HEAD_BYTES)
        if not magic.startswith(MAGIC):
            raise folder_source.refuse_unknown_file(source.label, magic)
        head = self.sources.head(file, HEAD_BYTES_MAX)
        plan = gguf_source.inspect(source.label, head, file.size_bytes, self._block_sizes, self._type_names)
        options = {
            "split": plan.split,
            "add_bos": "true" if plan.add_bos else "false",
            "end_ids": json.dumps(plan.end_ids),
        }
        provenance = {"format": f"gguf {plan.quantization}"}
        return Inspected("gguf", source.label, True, source.files, plan.license, options, provenance)

    def _folder(self, source: Source) -> Inspected:
        sizes = {file.path: file.size_bytes for file in source.files}
        plan = folder_source.inspect(source.label, sizes, self._small_files(source))
        used = tuple(file for file in source.files if file.path in plan.used)
        weights = [file for file in used if file.path in plan.weights]
        if plan.format == "pytorch":
            for file in weights:
                self._check_checkpoint(source.label, file)
        else:
            held = {file.path: self._check_weights(source.label, file) for file in weights}
            check_index(source.label, folder_source.INDEX, plan.weight_map, held)
        provenance = {"format": plan.format}
        return Inspected("folder", source.label, False, used, plan.license, {}, provenance)

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

    def _check_weights(self, label: str, file: SourceFile) -> frozenset[str]:
        """The tensors of a safetensors file."""
        length = int.from_bytes(self.sources.head(file, 8), "little")
        if length > SAFETENSORS_HEAD_BYTES_MAX and length <= file.size_bytes:
            raise source_invalid(
                label, f"{file.path} has a header of {length} bytes; at most {SAFETENSORS_HEAD_BYTES_MAX}"
            )
        head = self.sources.head(file, 8 + min(length, SAFETENSORS_HEAD_BYTES_MAX))
        return check_safetensors(label, file.path, head, file.size_bytes)

    def _check_checkpoint(self, label: str, file: SourceFile) -> None:
        """What is in it, only the converter looks at."""
        if not self.sources.head(file, len(ZIP_MAGIC)).startswith(ZIP_MAGIC):
            cause = f"{file.path} is no checkpoint as PyTorch writes it since version 1.6"
            raise source_invalid(label, f"{cause}; fetch it again, or save the model as safetensors")
