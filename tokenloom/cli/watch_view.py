"""One frame of `tokenloom status --watch`: a batcher replica's state, for people. Pure.

Bounds: `rows_max` lines of each table; what is left out is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1 import inference_pb2
from rich.console import Group, RenderableType
from rich.text import Text

from services.batcher.core.refusals import BANDS
from tokenloom.cli.columns import DASH, Cell, Column, bar, count, duration, fold, packed, rate, share
from tokenloom.cli.watch_history import History, Share

BAR_CELLS = 8
LEASES_SHOWN = 4
FLOWS_MIN = 2
"""A single tenant that waits is seen from the bands already."""
MODEL_DIGITS = 12
STALE_MS = 1_000
"""A report of this age is drawn to the eye."""

QUEUES = (
    Column("queue", right=False, key=True),
    Column("band", right=False, key=True),
    Column("waiting"),
    Column("oldest"),
    Column("prompt tokens"),
    Column("running"),
    Column("dispatched/s"),
)
FLOWS = (
    Column("tenant", right=False, key=True),
    Column("band", right=False),
    Column("waiting"),
    Column("weight"),
    Column("served/weight"),
)
TENANTS = (
    Column("tenant", right=False, key=True),
    Column("weight"),
    Column("queued"),
    Column("running"),
    Column("tokens/s"),
    Column("prompt"),
    Column("cached"),
    Column("generated"),
    Column("of service"),
    Column("of weight"),
)
WORKERS = (
    Column("worker", right=False, key=True),
    Column("state", right=False),
    Column("run/wait"),
    Column("free seqs"),
    Column("KV", right=False),
    Column("backlog"),
    Column("prefill/s"),
    Column("decode/s"),
    Column("delay"),
    Column("hit rate"),
    Column("prefixes"),
    Column("leases"),
    Column("report age"),
)
LEASES = (
    Column("oldest leases", right=False, key=True),
    Column("tenant", right=False),
    Column("worker", right=False),
    Column("age"),
)


def frame(name: str, history: History, *, width: int, rows_max: int) -> RenderableType:
    """Everything about one replica, `width` cells wide at most."""
    state = history.state
    parts: list[RenderableType] = [
        _head(name, state, width),
        packed([*_counters(history)], width),
        *_section(QUEUES, [row for queue in state.queues for row in _queue(queue)], width, rows_max),
        *_section(FLOWS, _flows(state), width, rows_max),
        *_section(TENANTS, _tenants(history), width, rows_max),
        *_section(WORKERS, [row for worker in state.workers for row in _worker(worker)], width, rows_max),
        *_section(LEASES, [_lease(lease) for lease in state.leases], width, LEASES_SHOWN, state.lease_count),
    ]
    return Group(*parts)


def summary(state: pb.State) -> str:
    """A replica in one line."""
    return ", ".join(_sums(state))


def _sums(state: pb.State) -> list[str]:
    depths: dict[str, int] = {}
    for queue in state.queues:
        for band, depth in queue.depth_by_priority.items():
            depths[band] = depths.get(band, 0) + depth
    by_band = ", ".join(f"{band} {depths[band]:,}" for band in BANDS if band in depths)
    oldest_ms = max((queue.oldest_wait_ms for queue in state.queues), default=0)
    detail = f" ({by_band}; the oldest for {duration(oldest_ms / 1000)})" if by_band else ""
    alive = sum(worker.alive for worker in state.workers)
    return [
        f"{sum(depths.values()):,} waiting{detail}",
        f"{state.lease_count:,} running",
        f"{alive} of {len(state.workers)} workers alive",
    ]


def _head(name: str, state: pb.State, width: int) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(state.unix_ms / 1000))
    draining = [Text("draining", "yellow")] if state.draining else []
    return packed([Text(name, "bold"), Text(clock, "dim"), *draining, *_sums(state)], width)


def _counters(history: History) -> Iterable[Cell]:
    counters = history.state.counters
    for name in ("arrived", "dispatched", "completed", "cancelled", "served_elsewhere", "promoted"):
        grown = history.rate(lambda state, name=name: getattr(state.counters, name))  # type: ignore[misc]
        title = name.replace("_", " ")
        yield f"{title} {count(getattr(counters, name))}{_per_s(grown)}"
    for reason in sorted(counters.refused):
        grown = history.rate(lambda state, reason=reason: _refused(state, reason))  # type: ignore[misc]
        yield Text(f"refused {reason} {count(counters.refused[reason])}{_per_s(grown)}", "yellow")


def _refused(state: pb.State, reason: str) -> int:
    # Not `[reason]`: a map of the wire makes an entry of what is only looked for.
    return state.counters.refused.get(reason, 0)


def _per_s(grown: float | None) -> str:
    return f" ({rate(grown)}/s)" if grown else ""


def _section(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int, rows_max: int, total: int = 0
) -> list[RenderableType]:
    """A blank line, the table, and how many of `total` (at least all rows) were left out."""
    if not rows:
        return []
    parts: list[RenderableType] = [Text(""), *fold(columns, rows[:rows_max], width)]
    left_out = max(total, len(rows)) - len(rows[:rows_max])
    if left_out:
        parts.append(Text(f"and {left_out:,} more", "dim"))
    return parts


def _queue(queue: pb.Queue) -> list[list[Cell]]:
    """The queue as a whole, and each band in which somebody waits."""
    model = _short(queue.model_version)
    pace = rate(queue.dispatch_rate) if queue.dispatch_rate else DASH
    oldest = duration(queue.oldest_wait_ms / 1000) if queue.depth else DASH
    whole = [count(queue.depth), oldest, count(queue.prompt_tokens), count(queue.running), pace]
    rows: list[list[Cell]] = [[model, "all", *whole]]
    for band in BANDS:
        if depth := queue.depth_by_priority.get(band, 0):
            oldest = duration(queue.oldest_wait_ms_by_priority.get(band, 0) / 1000)
            rows.append(["", band, count(depth), oldest, "", "", ""])
    return rows


def _flows(state: pb.State) -> list[list[Cell]]:
    flows = sorted(
        (flow for queue in state.queues for flow in queue.flows), key=lambda flow: flow.depth, reverse=True
    )
    if len(flows) < FLOWS_MIN:
        return []
    return [
        [flow.tenant, _band(flow.priority), count(flow.depth), f"{flow.weight:g}", count(flow.virtual_tokens)]
        for flow in flows
    ]


def _band(priority: int) -> str:
    return inference_pb2.Priority.Name(inference_pb2.Priority.ValueType(priority))[len("PRIORITY_") :].lower()


def _tenants(history: History) -> list[list[Cell]]:
    shares = history.shares()
    tenants = sorted(history.state.tenants, key=lambda tenant: _prominence(tenant, shares))
    return [
        [
            tenant.name,
            f"{tenant.weight:g}",
            count(tenant.queued),
            count(tenant.running),
            rate(history.tokens_per_s(tenant)),
            count(tenant.served_prompt_tokens),
            count(tenant.served_cached_tokens),
            count(tenant.served_generated_tokens),
            share(shares[tenant.name].of_service),
            share(shares[tenant.name].of_weight),
        ]
        for tenant in tenants
    ]


def _prominence(tenant: pb.Tenant, shares: Mapping[str, Share]) -> tuple[bool, float, str]:
    """Those with work first, then by what they were served."""
    return not (tenant.queued or tenant.running), -(shares[tenant.name].of_service or 0.0), tenant.name


def _worker(worker: pb.Worker) -> list[list[Cell]]:
    """One line for each model that it has; one line for a worker without any."""
    leases: list[Cell] = [count(worker.leases), _age(worker)]
    if not worker.models:
        return [[worker.endpoint, _state(worker, ""), *[DASH] * 9, *leases]]
    rows: list[list[Cell]] = []
    for model in worker.models:
        several = len(worker.models) > 1
        name = f"{worker.endpoint} {_short(model.model_version)}" if several else worker.endpoint
        rows.append([name, _state(worker, model.state), *_load(model), *leases])
    return rows


def _load(model: pb.WorkerModel) -> list[Cell]:
    used = 1 - model.free_blocks / model.total_blocks if model.total_blocks else None
    queried = model.prefix_queried_tokens
    return [
        f"{model.running}/{model.waiting}",
        count(model.free_sequences),
        DASH if used is None else f"{bar(used, BAR_CELLS)} {share(used)}",
        count(model.queued_prefill_tokens),
        rate(model.prefill_tokens_per_s or None),
        rate(model.decode_tokens_per_s or None),
        duration(model.delay_s) if model.state == "ready" else DASH,
        share(model.prefix_hit_tokens / queried if queried else None),
        count(model.known_prefixes),
    ]


def _state(worker: pb.Worker, model_state: str) -> Text:
    """The worker's, when something is wrong with it; else that of its model."""
    if not worker.alive:
        return Text("stale" if worker.report_age_ms else "lost", "red")
    if worker.draining:
        return Text("draining", "yellow")
    return Text(model_state or "empty", "green" if model_state == "ready" else "yellow")


def _age(worker: pb.Worker) -> Text:
    if not worker.report_age_ms and not worker.alive:
        return Text(DASH)
    style = "red" if worker.report_age_ms >= STALE_MS else ""
    return Text(duration(worker.report_age_ms / 1000), style)


def _lease(lease: pb.Lease) -> list[Cell]:
    worker = lease.served_by or lease.endpoint or DASH
    return [lease.request_id, lease.tenant, worker, duration(lease.age_ms / 1000)]


def _short(version: str) -> str:
    return version.removeprefix("sha256:")[:MODEL_DIGITS]
