"""How the core says no: a reason that programs read, a sentence that people read.

Reasons are names of `loom.errors.v1.ErrorReason` without prefix; the doors turn a refusal into a
gRPC status or an HTTP answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One field outside its bounds: its name, and what is wrong with it or how to mend it."""

    field: str
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


class Refusal(Exception):
    """The request cannot be served as it is."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)


def invalid(violations: Sequence[Violation]) -> Refusal:
    """One refusal that names every violation."""
    message = "; ".join(str(violation) for violation in violations)
    return Refusal(
        "FIELD_INVALID", message, metadata={"field": violations[0].field}, violations=tuple(violations)
    )


def unsupported(features: Sequence[Violation]) -> Refusal:
    """One refusal that names every known feature that is not offered."""
    message = "; ".join(str(feature) for feature in features)
    return Refusal(
        "FEATURE_UNSUPPORTED", message, metadata={"feature": features[0].field}, violations=tuple(features)
    )
