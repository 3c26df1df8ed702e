"""How callers name a model: `name`, `name@alias`, `name@sha256:<12 or more hex digits>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_ALIAS = "stable"
NAME_CHARS_MAX = 96
DIGEST_HEX_MIN = 12
DIGEST_HEX = 64

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What a model string means. Exactly one of `alias` and `digest_prefix` is set."""

    name: str
    alias: str | None
    digest_prefix: str | None
    """`sha256:` and at least 12 hex digits."""

    def __str__(self) -> str:
        return f"{self.name}@{self.digest_prefix or self.alias}"


def check_name(name: str) -> str:
    """`name` itself. Raises ValueError with the rule when it cannot name a model or an alias."""
    if not NAME_PATTERN.fullmatch(name):
        rule = f"1 to {NAME_CHARS_MAX} letters, digits, '.', '_' or '-', beginning with a letter or digit"
        raise ValueError(f"{name[:NAME_CHARS_MAX]!r} is no name: use {rule}")
    return name


def parse_model(text: str) -> ModelRef:
    """Raises ValueError that says what a model string looks like."""
    if not text:
        raise ValueError("is empty: give NAME, NAME@ALIAS or NAME@sha256:DIGEST")
    name, at, rest = text.partition("@")
    check_name(name)
    if not at:
        return ModelRef(name, DEFAULT_ALIAS, None)
    if rest.startswith("sha256:"):
        if not _DIGEST_PATTERN.fullmatch(rest):
            raise ValueError(
                f"{rest[:80]!r} is no digest: use sha256: and {DIGEST_HEX_MIN} to {DIGEST_HEX} hex digits"
            )
        return ModelRef(name, None, rest)
    return ModelRef(name, check_name(rest), None)
