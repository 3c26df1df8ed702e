"""What callers may ask of aliases and deprecations: all problems of a request together."""

from __future__ import annotations

from services.modelstore.core.requests import Violations
from tokenloom.contract.models import check_name

HISTORY_DEFAULT = 20
HISTORY_MAX = 1000
MIN_AGE_MS_MAX = 10 * 365 * 24 * 3600 * 1000


def check_alias_name(model: str, alias: str) -> Violations:
    """(field, what is wrong and the cure) for each problem."""
    problems: Violations = []
    for field, name in (("model", model), ("alias", alias)):
        try:
            check_name(name)
        except ValueError as error:
            problems.append((field, str(error)))
    return problems


def check_history(model: str, alias: str, limit: int) -> Violations:
    """`limit` 0 stands for HISTORY_DEFAULT."""
    problems = check_alias_name(model, alias)
    if limit > HISTORY_MAX:
        problems.append(("limit", f"{limit} is too many: use 1 to {HISTORY_MAX}, or 0 for {HISTORY_DEFAULT}"))
    return problems


def check_min_age(min_age_ms: int) -> Violations:
    """0 stands for the setting."""
    if min_age_ms > MIN_AGE_MS_MAX:
        return [("min_age_ms", f"{min_age_ms} is longer than ten years: use milliseconds")]
    return []
