"""What the core shows of itself: plain values, copied out, for people and tools."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.ledger import Counters, Ledger
from services.batcher.core.pool import Load
from services.batcher.core.queue import ModelQueue
from services.batcher.core.tenants import Tenant


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


class QueueView(NamedTuple):
    """One model's queue."""

    model: str
    depth: int
    prompt_tokens: int
    oldest_wait_s: float
    depth_by_priority: dict[int, int]


class LoadView(NamedTuple):
    """One model on one worker; free_* are what was reported less what was sent since."""

    model: str
    state: str
    running: int
    waiting: int
    free_sequences: int
    free_blocks: int
    total_blocks: int


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
    generated_tokens: int


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
        queues=[_queue(queue, now) for queue in ledger.queues.values()],
        workers=[_worker(worker, now) for worker in fleet.workers.values()],
        leases=[_lease(entry, now) for entry in islice(ledger.leased.values(), leases_max)],
        lease_count=len(ledger.leased),
        tenants=[_tenant(tenant) for tenant in ledger.tenants],
        counters=ledger.counters.copy(),
    )


def _tenant(tenant: Tenant) -> TenantView:
    return TenantView(
        tenant.name, tenant.queued, tenant.running, tenant.prompt_tokens, tenant.generated_tokens
    )


def _queue(queue: ModelQueue, now: float) -> QueueView:
    oldest = queue.oldest()
    waited_s = now - oldest.entered if oldest is not None else 0.0
    return QueueView(queue.model, len(queue), queue.prompt_tokens, waited_s, queue.depth_by_band())


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
    )


def _lease(entry: Entry, now: float) -> LeaseView:
    request = entry.request
    endpoint = entry.worker.endpoint if entry.worker is not None else ""
    return LeaseView(
        entry.lease_id, request.request_id, endpoint, request.tenant, now - entry.leased_at, entry.served_by
    )
