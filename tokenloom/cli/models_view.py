"""How models look to people: tables and one-liners."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from loom.modelstore.v1 import modelstore_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenloom.cli.columns import GAP, Cell, Column, duration, fold
from tokenloom.cli.models_progress import size
from tokenloom.cli.models_workers import Residence

SHORT_HEX = 12
NONE = "-"
STATE_STYLES = {"ready": "green", "fetching": "yellow", "loading": "yellow", "failed": "red"}
AGES = (("year", 31_536_000), ("month", 2_592_000), ("day", 86_400), ("hour", 3600), ("minute", 60))

Residents = Mapping[str, Sequence[Residence]] | None
"""By version; None when no worker was asked."""


def short(digest: str) -> str:
    """`sha256:` and the digits that suffice to name a version."""
    return digest[: len("sha256:") + SHORT_HEX]


def digits(digest: str) -> str:
    """The digits alone."""
    return short(digest).removeprefix("sha256:")


def parameters(count: int) -> str:
    """`134.5M`, `8.0B`; a dash for a model without weights."""
    if count == 0:
        return NONE
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def ago(moment: Timestamp, now_s: float | None = None) -> str:
    """`3 hours ago`; empty when it is not known."""
    if not moment.seconds:
        return ""
    seconds = (time.time() if now_s is None else now_s) - moment.seconds
    for unit, length_s in AGES:
        if seconds >= length_s:
            count = int(seconds // length_s)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _date(moment: Timestamp) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment.seconds)) if moment.seconds else "not known"


def total_bytes(version: pb.Version) -> int:
    """Of all its files."""
    return sum(file.size_bytes for file in version.manifest.files)


def shares(targets: Sequence[pb.AliasTarget]) -> str:
    """`sha256:9f3a0c1b2d4e 90%, sha256:1b2c3d4e5f60 10%`; the shares only where there are several."""
    if not targets:
        return "deleted"
    whole = sum(target.weight for target in targets)
    several = len(targets) > 1
    return ", ".join(
        short(target.digest) + (f" {percent(target.weight, whole)}" if several else "") for target in targets
    )


def percent(part: int, whole: int) -> str:
    """`10%`, `0.5%`."""
    return f"{100 * part / whole:.3g}%"


def _aliases_of(model: pb.Model, digest: str) -> str:
    names = []
    for alias in model.aliases:
        weights = {target.digest: target.weight for target in alias.targets}
        if digest in weights:
            share = f" {percent(weights[digest], sum(weights.values()))}" if len(weights) > 1 else ""
            names.append(alias.name + share)
    return ", ".join(names)


def imported_line(imported: pb.Imported) -> Text:
    """The end of an import."""
    version = imported.version
    manifest = version.manifest
    verb = "is imported as" if imported.created else "was there already as"
    line = Text.assemble((manifest.name, "bold"), f" {verb} ", (short(version.digest), "cyan"))
    weights = f"{parameters(manifest.parameters)} parameters, {manifest.dtype}"
    weights = weights if manifest.parameters else "no weights"
    return line.append(
        f" ({weights}, {size(total_bytes(version))}, context {manifest.context_length})", "dim"
    )


def listing(models: Iterable[pb.Model], residents: Residents, width: int) -> RenderableType:
    """A line for each version; a line for each model that has none left."""
    rows = [row for model in models for row in _rows(model, residents)]
    columns = [
        Column("MODEL", right=False, key=True),
        Column("VERSION", right=False, key=True),
        Column("ALIASES", right=False),
        Column("PARAMETERS"),
        Column("DTYPE", right=False),
        Column("SIZE"),
        Column("CONTEXT"),
        *([] if residents is None else [Column("RESIDENT", right=False)]),
        Column("IMPORTED", right=False),
        Column("NOTE", right=False),
    ]
    if not any(str(row[-1]) for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Group(*fold(columns, rows, max(width, GAP)))


def _rows(model: pb.Model, residents: Residents) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for version in model.versions:
        manifest = version.manifest
        mark = version.deprecation.message or "no reason given"
        rows.append(
            [
                Text(model.name, "bold"),
                Text(digits(version.digest), "cyan"),
                Text(_aliases_of(model, version.digest), "green"),
                parameters(manifest.parameters),
                manifest.dtype,
                size(total_bytes(version)),
                str(manifest.context_length),
                *([] if residents is None else [where(residents.get(version.digest, ()))]),
                ago(manifest.created_at),
                Text(f"deprecated: {mark}" if version.HasField("deprecation") else "", "yellow"),
            ]
        )
    return rows


def where(residences: Iterable[Residence]) -> Text:
    """`worker-0, worker-1 loading 40%`."""
    text = Text()
    for residence in residences:
        text.append(", " if text else "")
        state, style = residence.state, STATE_STYLES.get(residence.state, "yellow")
        done = f" {residence.model.progress:.0%}" if state in ("fetching", "loading") else ""
        text.append(residence.worker.name + ("" if state == "ready" else f" {state}{done}"), style)
    return text or Text(NONE, "dim")


def details(version: pb.Version, model: pb.Model, residences: Sequence[Residence] | None) -> RenderableType:
    """Everything about one version."""
    manifest = version.manifest
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    bos = str(manifest.bos_token_id) if manifest.HasField("bos_token_id") else "none"
    cache_bytes = manifest.kv_bytes_per_token
    full_bytes = cache_bytes * manifest.context_length
    rows = {
        "model": manifest.name,
        "version": version.digest,
        **_mark(version),
        "aliases": _aliases_of(model, version.digest) or "none",
        "architecture": f"{manifest.architecture} ({manifest.model_type})",
        "parameters": parameters(manifest.parameters),
        "weights": f"{size(manifest.weight_bytes)} as {manifest.dtype}" if manifest.weight_bytes else "none",
        "context": f"{manifest.context_length} tokens",
        "KV cache": f"{size(cache_bytes)} a token, {size(full_bytes)} a full context",
        "vocabulary": str(manifest.vocab_size),
        "stop tokens": ", ".join(map(str, manifest.stop_token_ids)) or "none",
        "first token": bos,
        "chat template": "yes" if manifest.has_chat_template else "no: plain prompts only",
        "licence": manifest.license or "not stated",
        "imported": _date(manifest.created_at),
        **{f"from: {key}": value for key, value in sorted(manifest.provenance.items())},
        **{f"checked: {key}": value for key, value in sorted(manifest.checked_with.items())},
    }
    for title, value in rows.items():
        grid.add_row(title, Text(value))
    for line in _memory(residences):
        grid.add_row("resident", Text(line))
    grid.add_row("in all", f"{size(total_bytes(version))} in {len(manifest.files)} files")
    for file in manifest.files:
        grid.add_row("file", Text(f"{file.path}  {size(file.size_bytes)}  {short(file.digest)}"))
    return grid


def _mark(version: pb.Version) -> dict[str, str]:
    if not version.HasField("deprecation"):
        return {}
    mark = version.deprecation
    return {"deprecated": f"{mark.message or 'no reason given'} (since {_date(mark.since)})"}


def _memory(residences: Sequence[Residence] | None) -> list[str]:
    """A line for each worker that has the version."""
    if residences is None:
        return []
    return [f"{each.worker.name}: {_on_worker(each)}" for each in residences] or ["nowhere"]


def _on_worker(residence: Residence) -> str:
    model = residence.model
    parts = [residence.state]
    if model.error:
        parts.append(model.error)
    if model.memory_bytes:
        parts.append(f"{size(model.memory_bytes)} reserved")
    if model.running or model.waiting:
        parts.append(f"{model.running} running, {model.waiting} waiting")
    elif model.idle_ms:
        parts.append(f"idle for {duration(model.idle_ms / 1000)}")
    if model.dwell_left_ms:
        parts.append(f"not to be evicted for {duration(model.dwell_left_ms / 1000)}")
    return ", ".join(parts)


def history(changes: Iterable[tuple[str, pb.Alias]], current: set[tuple[str, int]]) -> RenderableType:
    """A line for each change; `current` holds alias and sequence of those that stand now."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, GAP, 0, 0))
    for title in ("ALIAS", "CHANGE", "WHEN", "VERSION"):
        table.add_column(title, justify="right" if title == "CHANGE" else "left", no_wrap=title != "VERSION")
    for name, change in changes:
        now = (name, change.sequence) in current
        table.add_row(
            Text(name, "bold" if now else ""),
            str(change.sequence),
            ago(change.changed_at),
            Text(shares(change.targets) + (" (now)" if now else ""), "green" if now else ""),
        )
    return table
