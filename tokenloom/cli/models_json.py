"""The store's messages as plain values for `--json`. The shapes are those of docs/reference/models.md.

What is not known is null; fields are added, never renamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from loom.modelstore.v1 import modelstore_pb2 as pb

from tokenloom.cli.models_workers import Residence


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1))


def _time(message: Message, field: str) -> str | None:
    """RFC 3339, UTC; None where it is not set."""
    return getattr(message, field).ToJsonString() if message.HasField(field) else None


def version_json(version: pb.Version, residences: Iterable[Residence] | None = None) -> dict[str, Any]:
    """A version. `residences`: where workers have it; None when no worker was asked."""
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
        "files": [file_json(file) for file in manifest.files],
        "provenance": dict(manifest.provenance),
        "checked_with": dict(manifest.checked_with),
        "created_at": _time(manifest, "created_at"),
        "deprecation": _deprecation(version),
        "resident": None if residences is None else [residence_json(each) for each in residences],
    }


def _deprecation(version: pb.Version) -> dict[str, Any] | None:
    if not version.HasField("deprecation"):
        return None
    mark = version.deprecation
    return {"message": mark.message, "since": _time(mark, "since")}


def file_json(file: pb.File) -> dict[str, Any]:
    """A file of a version, or a stored blob."""
    return {"path": file.path, "digest": file.digest, "size_bytes": file.size_bytes}


def residence_json(residence: Residence) -> dict[str, Any]:
    """One version on one worker."""
    model = residence.model
    return {
        "worker": residence.worker.name,
        "endpoint": residence.worker.target,
        "state": residence.state,
        "progress": round(model.progress, 4),
        "error": model.error or None,
        "memory_bytes": model.memory_bytes,
        "running": model.running,
        "waiting": model.waiting,
        "idle_ms": model.idle_ms,
        "dwell_left_ms": model.dwell_left_ms,
    }


def targets_json(targets: Iterable[pb.AliasTarget]) -> list[dict[str, Any]]:
    """Shares of an alias."""
    return [{"digest": target.digest, "weight": target.weight} for target in targets]


def alias_json(alias: pb.Alias) -> dict[str, Any]:
    """One state of an alias."""
    return {
        "alias": alias.name,
        "sequence": alias.sequence,
        "targets": targets_json(alias.targets),
        "changed_at": _time(alias, "changed_at"),
    }


def aliases_json(model: pb.Model) -> list[dict[str, Any]]:
    """All aliases of a model."""
    return [alias_json(alias) for alias in model.aliases]


def model_json(model: pb.Model, residents: Mapping[str, Sequence[Residence]] | None) -> dict[str, Any]:
    """A model with its versions and aliases. `residents`: by digest; None when no worker was asked."""
    versions = [
        version_json(version, None if residents is None else residents.get(version.digest, ()))
        for version in model.versions
    ]
    return {"name": model.name, "aliases": aliases_json(model), "versions": versions}
