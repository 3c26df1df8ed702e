"""The scheduler's views in the words of `loom.batcher.v1`."""

from __future__ import annotations

from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1 import inference_pb2

from services.batcher.core.entry import band_of
from services.batcher.core.messages import Dispatch, Reject
from services.batcher.core.snapshot import (
    FlowView,
    LeaseView,
    LoadView,
    Place,
    QueueView,
    Snapshot,
    TenantView,
    WorkerView,
)

_BANDS: dict[int, str] = {
    number: name.removeprefix("PRIORITY_").lower()
    for name, number in inference_pb2.Priority.items()
    if number
}


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 0)


def _band(priority: int) -> inference_pb2.Priority.ValueType:
    return inference_pb2.Priority.ValueType(band_of(priority))


def state(snapshot: Snapshot, unix_ms: int) -> pb.State:
    """One replica's view."""
    counters = snapshot.counters
    return pb.State(
        unix_ms=unix_ms,
        draining=snapshot.draining,
        queues=[_queue(queue) for queue in snapshot.queues],
        workers=[_worker(worker) for worker in snapshot.workers],
        leases=[_lease(lease) for lease in snapshot.leases],
        lease_count=snapshot.lease_count,
        tenants=[_tenant(tenant) for tenant in snapshot.tenants],
        counters=pb.Counters(
            arrived=counters.arrived,
            dispatched=counters.dispatched,
            completed=counters.completed,
            cancelled=counters.cancelled,
            refused=counters.refused,
            served_elsewhere=counters.served_elsewhere,
            promoted=counters.promoted,
        ),
    )


def _queue(queue: QueueView) -> pb.Queue:
    names = {_BANDS[number]: depth for number, depth in queue.depth_by_priority.items()}
    waits = {_BANDS[number]: _ms(wait_s) for number, wait_s in queue.oldest_wait_by_priority.items()}
    return pb.Queue(
        model_version=queue.model,
        depth=queue.depth,
        prompt_tokens=queue.prompt_tokens,
        oldest_wait_ms=_ms(queue.oldest_wait_s),
        depth_by_priority=names,
        oldest_wait_ms_by_priority=waits,
        running=queue.running,
        flows=[_flow(flow) for flow in queue.flows],
        dispatch_rate=queue.dispatch_rate,
    )


def _flow(flow: FlowView) -> pb.Flow:
    return pb.Flow(
        priority=_band(flow.band),
        tenant=flow.tenant,
        depth=flow.depth,
        virtual_tokens=flow.virtual_tokens,
        weight=flow.weight,
    )


def _worker(worker: WorkerView) -> pb.Worker:
    return pb.Worker(
        endpoint=worker.endpoint,
        boot_id=worker.boot_id,
        alive=worker.alive,
        draining=worker.draining,
        report_age_ms=_ms(worker.report_age_s),
        models=[_load(load) for load in worker.loads],
        leases=worker.leases,
    )


def _load(load: LoadView) -> pb.WorkerModel:
    return pb.WorkerModel(
        model_version=load.model,
        state=load.state,
        running=load.running,
        waiting=load.waiting,
        free_sequences=load.free_sequences,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        queued_prefill_tokens=load.backlog_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        delay_s=load.delay_s,
        known_prefixes=load.known_prefixes,
        prefix_queried_tokens=load.prefix_queried_tokens,
        prefix_hit_tokens=load.prefix_hit_tokens,
    )


def _lease(lease: LeaseView) -> pb.Lease:
    return pb.Lease(
        lease_id=lease.lease_id,
        request_id=lease.request_id,
        endpoint=lease.endpoint,
        tenant=lease.tenant,
        age_ms=_ms(lease.age_s),
        served_by=lease.served_by,
    )


def _tenant(tenant: TenantView) -> pb.Tenant:
    return pb.Tenant(
        name=tenant.name,
        queued=tenant.queued,
        running=tenant.running,
        served_prompt_tokens=tenant.prompt_tokens,
        served_generated_tokens=tenant.generated_tokens,
        weight=tenant.weight,
        served_cached_tokens=tenant.cached_tokens,
    )


def news(what: Place | Dispatch | Reject) -> list[pb.WatchRequestResponse]:
    """What a watcher is told; of a model that is being loaded, the place and the progress."""
    if isinstance(what, Reject):
        return [pb.WatchRequestResponse(refused=pb.Refused(reason=what.reason, message=what.message))]
    if isinstance(what, Dispatch) or what.position is None:
        dispatched = pb.Dispatched(endpoint=what.endpoint, waited_ms=_ms(what.waited_s))
        return [pb.WatchRequestResponse(dispatched=dispatched)]
    queued = pb.Queued(position=what.position, waited_ms=_ms(what.waited_s), priority=_band(what.priority))
    told = [pb.WatchRequestResponse(queued=queued)]
    if what.progress is not None:
        loading = pb.Loading(endpoint=what.endpoint, progress=what.progress)
        told.append(pb.WatchRequestResponse(loading=loading))
    return told
