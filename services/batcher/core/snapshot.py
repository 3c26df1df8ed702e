"""What the core shows of itself: plain values, copied out, for people and tools.

Bounds: at most `FLOWS_MAX` flows of a queue, `TENANTS_MAX` tenants, and as many leases as are asked for.
"""

from __future__ import annotations

from heapq import nlargest
from itertools import islice
from typing import NamedTuple

from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.flows import Flow
from services.batcher.core.ledger import Counters, Ledger
from services.batcher.core.load import Load
from services.batcher.core.queue import ModelQueue
from services.batcher.core.tenants import Tenant

FLOWS_MAX = 64
"""The deepest of a queue."""
TENANTS_MAX = 1_000
"""Those with work first."""


class Place(NamedTuple):
    """Where one request is."""

    ticket: int
    position: int | None
    """Requests ahead of it; None when it was placed."""
    waited_s: float
    priority: int = 0
    endpoint: str = ""
    """Where it was placed, or where its model is being loaded."""
    progress: float | None = None
    """Of that load, 0 to 1."""


class FlowView(NamedTuple):
    """One tenant's waiting requests in one band."""

    band: int
    tenant: str
    depth: int
    virtual_tokens: float
    """Tokens served over weight: the least of a band goes first."""
    weight: float


class QueueView(NamedTuple):
    """One model's queue."""

    model: str
    depth: int
    prompt_tokens: int
    oldest_wait_s: float
    depth_by_priority: dict[int, int]
    oldest_wait_by_priority: dict[int, float]
    running: int
    flows: list[FlowView]
    """The deepest first."""
    dispatch_rate: float
    """Requests a second while some wait; 0 while it is unknown."""


class LoadView(NamedTuple):
    """One model on one worker; free_* are what was reported less what was sent since."""

    model: str
    state: str
    running: int
    waiting: int
    free_sequences: int
    free_blocks: int
    total_blocks: int
    backlog_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    delay_s: float
    """For the next request, less its own prompt; 0 while the model is not served there."""
    known_prefixes: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int


class WorkerView(NamedTuple):
    """One worker."""

    endpoint: str
    boot_id: str
    alive: bool
    draining: bool
    report_age_s: float
    loads: list[LoadView]
    leases: int


class LeaseView(NamedTuple):
    """One request that was placed."""

    lease_id: str
    request_id: str
    endpoint: str
    tenant: str
    age_s: float
    served_by: str


class TenantView(NamedTuple):
    """One tenant."""

    name: str
    queued: int
    running: int
    prompt_tokens: int
    """Those that no cache held."""
    generated_tokens: int
    weight: float
    cached_tokens: int


class Snapshot(NamedTuple):
    """One replica at one moment."""

    draining: bool
    queues: list[QueueView]
    workers: list[WorkerView]
    leases: list[LeaseView]
    lease_count: int
    tenants: list[TenantView]
    counters: Counters


def take(now: float, ledger: Ledger, fleet: Fleet, *, leases_max: int, draining: bool) -> Snapshot:
    """Copy it all out; of the leases, the `leases_max` oldest."""
    return Snapshot(
        draining=draining,
        queues=[_queue(queue, now) for queue in ledger.queues.values() if queue or queue.leases],
        workers=[_worker(worker, now) for worker in fleet.workers.values()],
        leases=[_lease(entry, now) for entry in islice(ledger.leased.values(), leases_max)],
        lease_count=len(ledger.leased),
        tenants=[_tenant(tenant) for tenant in islice(ledger.tenants, TENANTS_MAX)],
        counters=ledger.counters.copy(),
    )


def oldest_by_band(queue: ModelQueue, now: float) -> dict[int, float]:
    """How long each band's oldest has been here. Walks the queue until it has seen every band."""
    found: dict[int, float] = {}
    wanted = sum(1 for band in queue.bands if band.depth)
    for entry in queue.by_ticket.values():
        if len(found) == wanted:
            break
        found.setdefault(entry.band, now - entry.entered)
    return found


def _tenant(tenant: Tenant) -> TenantView:
    return TenantView(
        tenant.name,
        tenant.queued,
        tenant.running,
        tenant.prompt_tokens,
        tenant.generated_tokens,
        tenant.weight,
        tenant.cached_tokens,
    )


def _queue(queue: ModelQueue, now: float) -> QueueView:
    oldest = queue.oldest()
    deepest = nlargest(FLOWS_MAX, queue.waiting_flows(), key=lambda flow: len(flow[1].keys))
    return QueueView(
        queue.model,
        len(queue),
        queue.prompt_tokens,
        now - oldest.entered if oldest is not None else 0.0,
        queue.depth_by_band(),
        oldest_by_band(queue, now),
        queue.leases,
        [_flow(band, flow) for band, flow in deepest],
        1 / queue.gap_s if queue.gap_s else 0.0,
    )


def _flow(band: int, flow: Flow) -> FlowView:
    return FlowView(band, flow.tenant, len(flow.keys), flow.virtual, flow.weight)


def _worker(worker: Worker, now: float) -> WorkerView:
    age_s = now - worker.reported_at if worker.connected else 0.0
    loads = [_load(load) for load in worker.loads.values()]
    return WorkerView(
        worker.endpoint, worker.boot_id, worker.alive, worker.draining, age_s, loads, worker.leases
    )


def _load(load: Load) -> LoadView:
    report = load.report
    return LoadView(
        report.version,
        report.state.value,
        report.running,
        report.waiting,
        max(load.free_sequences, 0),
        max(load.free_blocks, 0),
        report.total_blocks,
        load.backlog_tokens,
        report.prefill_tokens_per_s,
        report.decode_tokens_per_s,
        load.delay_s() if load.ready else 0.0,
        len(load.holder.known),
        report.prefix_queried_tokens,
        report.prefix_hit_tokens,
    )


def _lease(entry: Entry, now: float) -> LeaseView:
    request = entry.request
    endpoint = entry.worker.endpoint if entry.worker is not None else ""
    return LeaseView(
        entry.lease_id, request.request_id, endpoint, request.tenant, now - entry.leased_at, entry.served_by
    )
