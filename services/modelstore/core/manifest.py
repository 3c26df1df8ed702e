"""Manifests: what a loader must know before it loads, as canonical JSON whose sha256 is the version.

Nothing that changes between two imports of the same bytes may enter a manifest: no time, no path of a
machine. Those are kept beside it, in a record of the import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from typing import Any

SCHEMA = 1
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def digest_of(data: bytes) -> str:
    """`sha256:…` of some bytes."""
    return f"sha256:{sha256(data).hexdigest()}"


def canonical(value: object) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _path(folder: str, digest: str, suffix: str = "") -> str:
    if not DIGEST_PATTERN.fullmatch(digest):
        raise ValueError(f"{digest[:80]!r} is no digest: use sha256: and 64 hex digits")
    return f"{folder}/sha256/{digest.removeprefix('sha256:')}{suffix}"


def blob_path(digest: str) -> str:
    """Where a blob is kept. Raises ValueError for anything that is not a whole digest."""
    return _path("blobs", digest)


def manifest_path(digest: str) -> str:
    """Where a manifest is kept. Raises ValueError for anything that is not a whole digest."""
    return _path("manifests", digest, ".json")


def import_path(digest: str) -> str:
    """Where a version's record of import is kept."""
    return _path("imports", digest, ".json")


def conversion_path(recipe: str) -> str:
    """Where the result of a conversion is kept, by the digest of everything that it depends on."""
    return _path("conversions", recipe, ".json")


def digest_in_path(path: str) -> str | None:
    """The digest that a manifest's path names, or None for any other path."""
    match = re.fullmatch(r"manifests/sha256/([0-9a-f]{64})\.json", path)
    return f"sha256:{match[1]}" if match else None


def blob_in_path(path: str) -> str | None:
    """The digest that a blob's path names, or None for any other path."""
    match = re.fullmatch(r"blobs/sha256/([0-9a-f]{64})", path)
    return f"sha256:{match[1]}" if match else None


def digests_in(data: bytes) -> set[str]:
    """Everything in some bytes that looks like a digest: all that a manifest of any schema may name."""
    return {found.decode() for found in re.findall(rb"sha256:[0-9a-f]{64}", data)}


@dataclass(frozen=True, slots=True, order=True)
class File:
    """One file of a version."""

    path: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What a conversion finds out about a model; the greater part of its manifest."""

    architecture: str
    model_type: str
    dtype: str
    context_length: int
    vocab_size: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    has_chat_template: bool
    stop_token_ids: tuple[int, ...]
    bos_token_id: int | None
    license: str
    checked_with: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Facts:
        """Raises KeyError or TypeError when `to_json` did not make `value`."""
        known = {f.name: value[f.name] for f in fields(cls)}
        known["stop_token_ids"] = tuple(int(i) for i in known["stop_token_ids"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One immutable version of a model."""

    name: str
    facts: Facts
    files: tuple[File, ...]
    """Sorted by path."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {
                "schema": SCHEMA,
                "name": self.name,
                **self.facts.to_json(),
                "files": [asdict(file) for file in self.files],
                "provenance": dict(self.provenance),
            }
        )

    @property
    def digest(self) -> str:
        """The version's name."""
        return digest_of(self.to_bytes())

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size_bytes for file in self.files)


def make_manifest(
    name: str, facts: Facts, files: Iterable[File], provenance: Mapping[str, str] | None = None
) -> Manifest:
    """A manifest with its files in order. Raises ValueError for a path that leaves the version's folder."""
    ordered = tuple(sorted(files))
    for file in ordered:
        parts = file.path.split("/")
        if file.path.startswith("/") or "\\" in file.path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"file path {file.path!r} leaves the version's folder")
    return Manifest(name, facts, ordered, dict(provenance or {}))


class ManifestError(ValueError):
    """Stored bytes are not the manifest that their name promises."""


def parse_manifest(data: bytes, digest: str) -> Manifest:
    """The manifest in `data`. Raises ManifestError when digest, schema or a field is wrong."""
    actual = digest_of(data)
    if actual != digest:
        raise ManifestError(f"manifest {digest} holds bytes with digest {actual}")
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ManifestError(
                f"manifest {digest} has schema {value['schema']}; this version reads {SCHEMA}"
            )
        files = [File(f["path"], f["digest"], int(f["size_bytes"])) for f in value["files"]]
        return make_manifest(value["name"], Facts.from_json(value), files, value["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"manifest {digest} is not readable: {error!r}") from error


@dataclass(frozen=True, slots=True)
class ImportRecord:
    """When and from where a version first came: true of this store, not of the model."""

    created_unix_ms: int
    source: str

    def to_bytes(self) -> bytes:
        return canonical(asdict(self))

    @classmethod
    def unknown(cls) -> ImportRecord:
        """Of a version whose record is missing or damaged."""
        return cls(0, "")

    @classmethod
    def from_bytes(cls, data: bytes | None) -> ImportRecord:
        """What is missing or unreadable counts as unknown: nothing depends on it."""
        try:
            value = json.loads(data or b"{}")
            return cls(int(value["created_unix_ms"]), str(value["source"]))
        except (KeyError, TypeError, ValueError):
            return cls.unknown()
