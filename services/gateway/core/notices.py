"""What a response header says to people about the version that served: ASCII, on one line, bounded."""

from __future__ import annotations

from string import ascii_letters, digits, punctuation
from urllib.parse import quote

from services.gateway.core.catalogue import ModelVersion
from tokenloom.contract import headers

NOTICE_BYTES_MAX = 512
"""A header's value as it travels. gRPC takes a few KiB of headers in all."""

_SAFE = (ascii_letters + digits + punctuation + " ").replace("%", "")


def deprecation_headers(version: ModelVersion) -> list[tuple[str, str]]:
    """What a caller is told beside an answer; empty for a version that is not deprecated."""
    if version.deprecation is None:
        return []
    return [(headers.MODEL_DEPRECATED, header_value(version.deprecation.message, "deprecated"))]


def header_value(text: str, otherwise: str) -> str:
    """`text` percent-encoded in UTF-8 as gRPC writes `grpc-message`, cut at a character; never empty.

    Plain ASCII without `%` stays as it is. `otherwise` stands for a text without words.
    """
    parts, size = [], 0
    for character in " ".join(text.split()):
        part = quote(character, safe=_SAFE, errors="replace")
        size += len(part)
        if size > NOTICE_BYTES_MAX:
            break
        parts.append(part)
    return "".join(parts).strip() or otherwise
