"""What callers may ask for: names, dtypes and alias targets, all problems of a request together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.modelstore.core.aliases import Target, check_targets
from services.modelstore.core.builtin import PREFIX
from services.modelstore.core.manifest import DIGEST_PATTERN, DTYPE_BYTES
from services.modelstore.core.urls import is_url, parse_source
from tokenloom.contract.models import check_name

ALIASES_MAX = 16
SOURCE_CHARS_MAX = 4096
SOURCES = (
    "the path or http(s) URL of a GGUF file or of a Hugging Face folder (a folder's URL ends in /), "
    "or builtin:sim"
)
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
DEFAULT_DTYPE = "bfloat16"

Violations = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """A checked request: `check_import` found nothing."""

    source: str
    name: str
    dtype: str = DEFAULT_DTYPE
    aliases: tuple[str, ...] = ()
    source_digest: str = ""
    """`sha256:…` that a source which is one file must have; empty: whatever it has."""


def check_import(request: ImportRequest) -> Violations:
    """(field, what is wrong and the cure) for each problem."""
    problems: Violations = []
    if why := _source_problem(request.source):
        problems.append(("source", why))
    if request.source_digest:
        problems += check_digest("source_digest", request.source_digest)
        if request.source.startswith(PREFIX):
            problems.append(("source_digest", "is for a source that is one file: leave it out"))
    problems += _name_problem("name", request.name)
    if request.dtype not in DTYPE_BYTES:
        problems.append(("dtype", f"{request.dtype[:40]!r} is none of {', '.join(DTYPE_BYTES)}"))
    if len(request.aliases) > ALIASES_MAX:
        problems.append(("aliases", f"at most {ALIASES_MAX}"))
    for alias in request.aliases[:ALIASES_MAX]:
        problems += _name_problem("aliases", alias)
    return problems


def _source_problem(source: str) -> str:
    if not source or len(source) > SOURCE_CHARS_MAX or "\0" in source:
        return f"give {SOURCES}"
    path = source
    if is_url(source):
        try:
            path = parse_source(source).path
        except ValueError as error:
            return str(error)
    if path.lower().endswith(ARCHIVES):
        name = path.rpartition("/")[2][:80]
        return f"{name!r} is an archive, which is not read: unpack it and give the folder"
    return ""


def check_alias(model: str, alias: str, targets: Sequence[Target]) -> Violations:
    """(field, what is wrong and the cure) for each problem."""
    problems = _name_problem("model", model) + _name_problem("alias", alias)
    if why := check_targets(targets):
        problems.append(("targets", why))
    problems += [p for target in targets for p in check_digest("targets.digest", target.digest)]
    return problems


def check_digest(field: str, digest: str) -> Violations:
    """A whole digest, not a prefix of one."""
    if DIGEST_PATTERN.fullmatch(digest):
        return []
    return [(field, f"{digest[:80]!r} is no digest: use sha256: and 64 hex digits")]


def check_range(offset: int, length: int, size: int) -> Violations:
    """A piece of a blob; the end itself may be asked for and is empty."""
    if offset > size:
        return [("offset", f"{offset} is past the end of the blob of {size} bytes")]
    if length and offset + length > size:
        return [("length", f"{offset} + {length} is past the end of the blob of {size} bytes")]
    return []


def _name_problem(field: str, name: str) -> Violations:
    try:
        check_name(name)
    except ValueError as error:
        return [(field, str(error))]
    return []
