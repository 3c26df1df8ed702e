"""The core's snapshot and places, in the words of `loom.batcher.v1`."""

from __future__ import annotations

from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1 import inference_pb2

from services.batcher.core.ledger import Counters
from services.batcher.core.messages import Reject
from services.batcher.core.snapshot import Place, QueueView, Snapshot, WorkerView

_BANDS: dict[int, str] = {
    number: name.removeprefix("PRIORITY_").lower()
    for name, number in inference_pb2.Priority.items()
    if number
}


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 0)


def state(snapshot: Snapshot, unix_ms: int) -> pb.State:
    """One replica's view, as a message."""
    return pb.State(
        unix_ms=unix_ms,
        draining=snapshot.draining,
        queues=[_queue(queue) for queue in snapshot.queues],
        workers=[_worker(worker) for worker in snapshot.workers],
        leases=[
            pb.Lease(
                lease_id=lease.lease_id,
                request_id=lease.request_id,
                endpoint=lease.endpoint,
                tenant=lease.tenant,
                age_ms=_ms(lease.age_s),
                served_by=lease.served_by,
            )
            for lease in snapshot.leases
        ],
        lease_count=snapshot.lease_count,
        tenants=[
            pb.Tenant(
                name=tenant.name,
                queued=tenant.queued,
                running=tenant.running,
                served_prompt_tokens=tenant.prompt_tokens,
                served_generated_tokens=tenant.generated_tokens,
            )
            for tenant in snapshot.tenants
        ],
        counters=_counters(snapshot.counters),
    )


def _queue(queue: QueueView) -> pb.Queue:
    depths = {_BANDS.get(band, str(band)): depth for band, depth in queue.depth_by_priority.items()}
    return pb.Queue(
        model_version=queue.model,
        depth=queue.depth,
        prompt_tokens=queue.prompt_tokens,
        oldest_wait_ms=_ms(queue.oldest_wait_s),
        depth_by_priority=depths,
    )


def _worker(worker: WorkerView) -> pb.Worker:
    models = [
        pb.WorkerModel(
            model_version=load.model,
            state=load.state,
            running=load.running,
            waiting=load.waiting,
            free_sequences=load.free_sequences,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
        )
        for load in worker.loads
    ]
    return pb.Worker(
        endpoint=worker.endpoint,
        boot_id=worker.boot_id,
        alive=worker.alive,
        draining=worker.draining,
        report_age_ms=_ms(worker.report_age_s),
        models=models,
        leases=worker.leases,
    )


def _counters(counters: Counters) -> pb.Counters:
    return pb.Counters(
        arrived=counters.arrived,
        dispatched=counters.dispatched,
        completed=counters.completed,
        cancelled=counters.cancelled,
        refused=counters.refused,
        served_elsewhere=counters.served_elsewhere,
    )


def event(place: Place | Reject) -> pb.WatchRequestResponse:
    """What becomes of one request."""
    if isinstance(place, Reject):
        return pb.WatchRequestResponse(refused=pb.Refused(reason=place.reason, message=place.message))
    waited_ms = _ms(place.waited_s)
    if place.position is None:
        return pb.WatchRequestResponse(dispatched=pb.Dispatched(endpoint=place.endpoint, waited_ms=waited_ms))
    if place.progress is not None:
        return pb.WatchRequestResponse(loading=pb.Loading(endpoint=place.endpoint, progress=place.progress))
    priority = inference_pb2.Priority.ValueType(place.priority)
    queued = pb.Queued(position=place.position, waited_ms=waited_ms, priority=priority)
    return pb.WatchRequestResponse(queued=queued)


def without_time(response: pb.WatchRequestResponse) -> bytes:
    """The event but for how long it took: the same place is told once."""
    same = pb.WatchRequestResponse.FromString(response.SerializeToString())
    if same.HasField("queued"):
        same.queued.waited_ms = 0
    return same.SerializeToString(deterministic=True)
