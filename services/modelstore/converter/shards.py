"""Writes tensors as safetensors files of bounded size, the same bytes for the same tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.modelstore.core.folder_source import INDEX, SINGLE


class ShardWriter:
    """Takes tensors in a fixed order and holds at most one shard of them in memory."""

    def __init__(self, folder: Path, shard_bytes_max: int) -> None:
        self._folder = folder
        self._shard_bytes_max = shard_bytes_max
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.names: set[str] = set()
        self.elements = 0
        self.size_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor larger than a shard gets a shard of its own."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes_max:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.names.add(name)
        self.elements += tensor.numel()
        self.size_bytes += size

    def finish(self) -> list[str]:
        """The files, now complete: one, or numbered ones and their index."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self._folder / SINGLE)
            return [SINGLE]
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        files = [INDEX]
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
            files.append(final)
        index = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        return files

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._shards)}.partial"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
