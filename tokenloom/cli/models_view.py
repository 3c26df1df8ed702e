"""How models look: tables and one-liners for people, plain values for programs."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any

from loom.modelstore.v1 import modelstore_pb2 as pb
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

SHORT_HEX = 12
STAGES = {"read": "reading", "convert": "converting", "hash": "hashing", "store": "storing"}


class ImportProgress:
    """A bar for each stage on a terminal, a line for each elsewhere, nothing when hidden."""

    def __init__(self, console: Console, *, hidden: bool) -> None:
        self._console = console
        self._hidden = hidden
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=hidden or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ImportProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bars.stop()

    def show(self, progress: pb.Progress) -> None:
        """One event of the import."""
        total = progress.total_bytes or None
        if progress.stage not in self._tasks:
            label = STAGES.get(progress.stage, progress.stage)
            self._tasks[progress.stage] = self._bars.add_task(label, total=total)
            if not self._hidden and not self._console.is_terminal:
                self._console.print(f"{label} …")
        self._bars.update(self._tasks[progress.stage], completed=progress.done_bytes, total=total)


def short(digest: str) -> str:
    """`sha256:` and the digits that suffice to name a version."""
    return digest[: len("sha256:") + SHORT_HEX]


def size(count: int) -> str:
    """`269.1 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def parameters(count: int) -> str:
    """`134.5M`, `8.0B`; a dash for a model without weights."""
    if count == 0:
        return "-"
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _created(version: pb.Version) -> str:
    seconds = version.manifest.created_at.seconds
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _total(version: pb.Version) -> int:
    return sum(file.size_bytes for file in version.manifest.files)


def _aliases_of(model: pb.Model, digest: str) -> str:
    names = []
    for alias in model.aliases:
        weights = {target.digest: target.weight for target in alias.targets}
        if digest in weights:
            share = f" {100 * weights[digest] / sum(weights.values()):.0f}%" if len(weights) > 1 else ""
            names.append(alias.name + share)
    return ", ".join(names)


def imported_line(imported: pb.Imported) -> Text:
    """The end of an import."""
    version = imported.version
    manifest = version.manifest
    verb = "is imported as" if imported.created else "was there already as"
    line = Text.assemble((manifest.name, "bold"), f" {verb} ", (short(version.digest), "cyan"))
    return line.append(
        f" ({parameters(manifest.parameters)} parameters, {manifest.dtype}, {size(_total(version))},"
        f" context {manifest.context_length})",
        "dim",
    )


def table(models: list[pb.Model]) -> Table:
    """A line for each version."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("MODEL", "VERSION"):
        found.add_column(title, no_wrap=True)
    found.add_column("ALIASES")
    for title in ("PARAMETERS", "SIZE", "CONTEXT", "IMPORTED"):
        found.add_column(title, justify="right", no_wrap=True)
    for model in models:
        for version in model.versions:
            manifest = version.manifest
            found.add_row(
                model.name,
                Text(short(version.digest).removeprefix("sha256:"), "cyan"),
                Text(_aliases_of(model, version.digest), "green"),
                parameters(manifest.parameters),
                size(_total(version)),
                str(manifest.context_length),
                _created(version)[:10],
            )
    return found


def details(version: pb.Version, model: pb.Model) -> RenderableType:
    """Everything about one version."""
    manifest = version.manifest
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    bos = str(manifest.bos_token_id) if manifest.HasField("bos_token_id") else "none"
    rows = {
        "model": manifest.name,
        "version": version.digest,
        "aliases": _aliases_of(model, version.digest) or "none",
        "architecture": f"{manifest.architecture} ({manifest.model_type})",
        "parameters": parameters(manifest.parameters),
        "weights": f"{size(manifest.weight_bytes)} as {manifest.dtype}",
        "context": f"{manifest.context_length} tokens",
        "KV cache": f"{size(manifest.kv_bytes_per_token)} a token",
        "vocabulary": str(manifest.vocab_size),
        "stop tokens": ", ".join(map(str, manifest.stop_token_ids)) or "none",
        "first token": bos,
        "chat template": "yes" if manifest.has_chat_template else "no: plain prompts only",
        "licence": manifest.license or "not stated",
        "imported": _created(version),
        **{f"from: {key}": value for key, value in sorted(manifest.provenance.items())},
        **{f"checked: {key}": value for key, value in sorted(manifest.checked_with.items())},
    }
    for title, value in rows.items():
        grid.add_row(title, value)
    for file in manifest.files:
        grid.add_row("file", f"{file.path}  {size(file.size_bytes)}  {short(file.digest)}")
    return grid


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1))


def version_json(version: pb.Version) -> dict[str, Any]:
    """A version as plain values."""
    manifest = version.manifest
    plain = {
        field.name: getattr(manifest, field.name)
        for field in manifest.DESCRIPTOR.fields
        if not field.message_type and field.name not in ("stop_token_ids", "bos_token_id")
    }
    return {
        "digest": version.digest,
        **plain,
        "stop_token_ids": list(manifest.stop_token_ids),
        "bos_token_id": manifest.bos_token_id if manifest.HasField("bos_token_id") else None,
        "files": [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in manifest.files],
        "provenance": dict(manifest.provenance),
        "checked_with": dict(manifest.checked_with),
        "created_at": manifest.created_at.ToJsonString() if manifest.HasField("created_at") else None,
    }


def alias_json(alias: pb.Alias) -> dict[str, Any]:
    """An alias as plain values."""
    targets = [{"digest": t.digest, "weight": t.weight} for t in alias.targets]
    return {"alias": alias.name, "sequence": alias.sequence, "targets": targets}


def aliases_json(model: pb.Model) -> list[dict[str, Any]]:
    """All aliases of a model."""
    return [alias_json(alias) for alias in model.aliases]


def model_json(model: pb.Model) -> dict[str, Any]:
    """A model with its versions and aliases."""
    versions = [version_json(version) for version in model.versions]
    return {"name": model.name, "aliases": aliases_json(model), "versions": versions}
