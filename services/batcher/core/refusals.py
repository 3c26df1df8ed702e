"""Why a request is refused, in words: reason, a message that names the cure, and when to try again.

It decides the wording and the hint, never whether to refuse.
"""

from __future__ import annotations

from services.batcher.core.admission import Full
from services.batcher.core.entry import Entry
from services.batcher.core.messages import ModelState, Reject, Verdict
from services.batcher.core.pool import Pool
from services.batcher.core.residency import Want

RETRY_MIN_S = 0.1
RETRY_MAX_S = 30.0
RETRY_UNKNOWN_S = 1.0
"""The hint of a full queue whose pace is not known yet."""
RETRY_NO_WORKER_S = 2.0
RETRY_ELSEWHERE_S = 0.1
"""Another replica answers: try at once, but not in a spin."""
BANDS = ("interactive", "standard", "batch", "sheddable")
MEMORY_BUSY = "MODEL_MEMORY_BUSY"
NOT_FOUND = "MODEL_NOT_FOUND"
MODEL_CHARS = 19
"""`sha256:` and 12 digits are enough for people."""


def _reject(
    entry: Entry, now: float, reason: str, message: str, retry_s: float | None, **data: object
) -> Reject:
    metadata = {key: str(value) for key, value in data.items()}
    return Reject(entry.ticket, entry.request, reason, message, metadata, retry_s, now - entry.entered)


def retry_hint_s(drain_estimate_s: float) -> float:
    """When a queue of this estimate is worth another try."""
    return min(max(drain_estimate_s or RETRY_UNKNOWN_S, RETRY_MIN_S), RETRY_MAX_S)


def draining(entry: Entry, now: float) -> Reject:
    message = "this batcher is shutting down; send the request again and another replica answers"
    return _reject(entry, now, "DRAINING", message, RETRY_ELSEWHERE_S, service="batcher")


def deadline(entry: Entry, now: float) -> Reject:
    """Its deadline passed, before its arrival or while it waited."""
    waited_s = now - entry.entered
    when = f"after {waited_s:.3f} s in the queue" if waited_s else "before the request came here"
    message = f"the deadline passed {when}; allow more time"
    return _reject(entry, now, "DEADLINE_UNREACHABLE", message, None, estimate_ms=0)


def unreachable(entry: Entry, now: float, estimate_s: float) -> Reject:
    """Its deadline lies before the first token that it could get."""
    left_s = entry.request.deadline - now
    message = (
        f"the first token is expected in {estimate_s:.3f} s at the present pace and the deadline is in "
        f"{left_s:.3f} s; allow more time or try again later"
    )
    retry_s = retry_hint_s(estimate_s)
    return _reject(entry, now, "DEADLINE_UNREACHABLE", message, retry_s, estimate_ms=round(estimate_s * 1000))


def queues_full(entry: Entry, now: float, limit: int) -> Reject:
    """Too many models are waited for."""
    retry_s = retry_hint_s(0.0)
    message = f"{limit:,} models are waited for already; try again in {retry_s:.1f} s"
    return _reject(entry, now, "QUEUE_FULL", message, retry_s, queue=entry.request.model, limit=limit)


def queue_full(entry: Entry, now: float, bound: Full, drain_estimate_s: float) -> Reject:
    """`bound` is the one that was reached."""
    retry_s = retry_hint_s(drain_estimate_s)
    queue, tenant = entry.request.model, entry.request.tenant
    limit = f"({bound.what}: {bound.limit:,}); try again in {retry_s:.1f} s"
    if bound.scope == "tenant":
        message = f"tenant {tenant!r} holds its share of the queue of model {queue[:MODEL_CHARS]} {limit}"
        return _reject(entry, now, "TENANT_OVER_SHARE", message, retry_s, tenant=tenant, limit=bound.limit)
    whose = f"band {BANDS[entry.band - 1]} of the queue" if bound.scope == "band" else "the queue"
    message = f"{whose} of model {queue[:MODEL_CHARS]} is full {limit}"
    return _reject(entry, now, "QUEUE_FULL", message, retry_s, queue=queue, limit=bound.limit)


def shed(entry: Entry, now: float, drain_estimate_s: float) -> Reject:
    """It waited, and a more urgent request takes its place in a full queue."""
    retry_s = retry_hint_s(drain_estimate_s)
    band = BANDS[entry.band - 1]
    message = f"the queue is full and more urgent requests came; those of band {band} are dropped first"
    return _reject(entry, now, "SHED", message, retry_s, priority=band)


def not_ready(entry: Entry, now: float, pool: Pool, want: Want | None = None) -> Reject:
    """The model is being loaded, or waits for memory, and that takes too long."""
    said = want.verdict(want.waits_for, now) if want is not None and not pool.hopeful else None
    if want is not None and said is not None and said.reason == MEMORY_BUSY:
        return _no_memory(entry, now, want.waits_for, said, want.verdicts[want.waits_for][1] - now)
    coming = pool.coming()
    where = f" ({coming.report.progress:.0%} on {coming.worker.endpoint})" if coming is not None else ""
    waited_s = now - entry.entered
    model = entry.request.model
    state = f"is still being loaded{where}"
    if want is not None and said is not None:
        state = f"could not be loaded on {want.waits_for} yet ({said.message})"
    elif not pool.hopeful and want is not None and want.waits_for:
        state = f"still waits for memory on {want.waits_for}, which keeps what was loaded lately,"
    message = f"model {model[:MODEL_CHARS]} {state} after {waited_s:.1f} s; try again"
    return _reject(entry, now, "MODEL_NOT_READY", message, RETRY_NO_WORKER_S, model=model)


def _no_memory(entry: Entry, now: float, endpoint: str, said: Verdict, left_s: float) -> Reject:
    """The worker said what the model needs and what it has; what is there stays for `left_s`."""
    model, sizes = entry.request.model, said.metadata
    figures = ""
    if "needed_bytes" in sizes and "free_bytes" in sizes:
        figures = f": it needs {sizes['needed_bytes']} bytes, {sizes['free_bytes']} are free"
        figures += f" of {sizes['budget_bytes']}" if "budget_bytes" in sizes else ""
    message = (
        f"model {model[:MODEL_CHARS]} still waits for memory on {endpoint} after {now - entry.entered:.1f} s"
        f"{figures}; what is there may not leave for another {left_s:.1f} s, try again then"
    )
    retry_s = max(left_s, RETRY_MIN_S)
    return _reject(entry, now, said.reason, message, retry_s, **{**sizes, "model": model})


def queue_timeout(entry: Entry, now: float, drain_estimate_s: float) -> Reject:
    waited_s = now - entry.entered
    message = f"no worker became free within {waited_s:.1f} s; try again later or add workers"
    retry_s = retry_hint_s(drain_estimate_s)
    return _reject(entry, now, "QUEUE_TIMEOUT", message, retry_s, waited_ms=round(waited_s * 1000))


def no_capacity(entry: Entry, now: float, pool: Pool) -> Reject:
    """Nobody serves the model, nor will soon."""
    model = entry.request.model
    why = next(
        (
            f" (loading failed on {load.worker.endpoint}: {load.report.error})"
            for load in pool.loads.values()
            if load.report.state is ModelState.FAILED
        ),
        "",
    )
    message = f"no live worker serves model {model[:MODEL_CHARS]}{why}; start one that loads it"
    return _reject(entry, now, "NO_CAPACITY", message, RETRY_NO_WORKER_S, model=model)


def not_loadable(entry: Entry, now: float, verdict: Verdict) -> Reject:
    """No worker has the model, and all that load on demand said why they cannot; this is what one said."""
    model, reason = entry.request.model, verdict.reason
    data = {"model": model, **verdict.metadata}
    if reason == NOT_FOUND:
        # Of a worker that means that it has not got it, which is worth another try. This is not.
        reason, data["cause"] = "MODEL_LOAD_FAILED", verdict.message
    message = f"no worker can load model {model[:MODEL_CHARS]}: {verdict.message}"
    return _reject(entry, now, reason, message, verdict.retry_after_s, **data)


def too_large(entry: Entry, now: float, largest_tokens: int) -> Reject:
    """No worker could hold the prompt even when idle."""
    size = entry.request.prompt_tokens
    message = (
        f"a prompt of {size:,} tokens does not fit in the KV cache of any worker of this model "
        f"(at most {largest_tokens:,}); shorten it"
    )
    return _reject(
        entry, now, "REQUEST_TOO_LARGE", message, None, field="prompt", size=size, limit=largest_tokens
    )
