"""What a worker says when it does not load a model, or sends a sequence away with one: words and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.worker.front.ports import ModelVersion
from services.worker.front.reservation import Reservation, in_words
from services.worker.front.residency import Busy, TooLarge
from tokenloom.kit.errors import CallError

RETRY_LEAST_S = 0.5
"""Nobody asks sooner than this again."""


def not_resident(digest: str) -> CallError:
    """A version that this worker does not have."""
    shown = digest[:80]
    return CallError("MODEL_NOT_FOUND", f"model {shown!r} is not resident here", metadata={"model": shown})


def not_on_demand(digest: str) -> CallError:
    """A worker that serves what its settings name, and nothing else."""
    shown = digest[:80]
    message = (
        f"this worker does not have model {shown!r} and loads none by command (loads_on_demand is off): "
        "name the model in its setting models"
    )
    return CallError("PERMISSION_DENIED", message, metadata={"permission": "loads_on_demand"})


def not_admitted(
    version: ModelVersion,
    reservation: Reservation,
    answer: TooLarge | Busy,
    *,
    evict: bool,
    models_max: int,
    min_dwell_s: float,
) -> CallError:
    """A version that does not fit, now or ever. MODEL_TOO_LARGE or MODEL_MEMORY_BUSY."""
    needed = reservation.total_bytes
    if isinstance(answer, TooLarge):
        message = (
            f"model {version.name} needs {in_words(needed)} ({reservation}) and this worker has "
            f"{in_words(answer.budget_bytes)} in all: raise memory_bytes, or lower kv_cache_bytes"
        )
        sizes = {"needed_bytes": str(needed), "available_bytes": str(answer.budget_bytes)}
        return CallError("MODEL_TOO_LARGE", message, metadata=sizes)
    if answer.lacks_memory:
        what = (
            f"model {version.name} needs {in_words(needed)} and {in_words(answer.free_bytes)} of "
            f"{in_words(answer.budget_bytes)} are free"
        )
    else:
        what = f"this worker holds models_max ({models_max}) models, so {version.name} has no place"
    sizes = {
        "needed_bytes": str(needed),
        "free_bytes": str(answer.free_bytes),
        "budget_bytes": str(answer.budget_bytes),
    }
    retry_s = max(RETRY_LEAST_S, answer.retry_s)
    message = f"{what}: {_cure(answer, evict, min_dwell_s)}"
    return CallError("MODEL_MEMORY_BUSY", message, metadata=sizes, retry_after_s=retry_s)


def too_large_together(sizes: Mapping[str, int], budget_bytes: int) -> CallError:
    """Models of the settings, by name, each of which would fit alone. MODEL_TOO_LARGE."""
    needed = sum(sizes.values())
    each = ", ".join(f"{name} {in_words(size)}" for name, size in sizes.items())
    message = (
        f"the models of the settings need {in_words(needed)} together ({each}) and this worker has "
        f"{in_words(budget_bytes)} in all: name fewer in models, raise memory_bytes, or lower kv_cache_bytes"
    )
    about = {"needed_bytes": str(needed), "available_bytes": str(budget_bytes)}
    return CallError("MODEL_TOO_LARGE", message, metadata=about)


def _cure(answer: Busy, evict: bool, min_dwell_s: float) -> str:
    if not evict:
        return "unload a model first, or load this one with evict"
    retry_s = max(RETRY_LEAST_S, answer.retry_s)
    return (
        f"no model that would make room may be evicted for another {retry_s:.1f} s "
        f"(min_dwell_s is {min_dwell_s:g}); try again then, or unload one"
    )


def leaves(model: str, worker: str) -> CallError:
    """For the sequences of a model that is evicted. Retriable."""
    message = f"model {model} leaves worker {worker} to make room for another; send the request again"
    return CallError("DRAINING", message, metadata={"service": "worker"})


def waits_for_memory(model: str, leaving: Iterable[str]) -> str:
    """Why a model is not loaded yet."""
    names = ", ".join(leaving) or "another model"
    return f"model {model} waits for the memory of {names}"
