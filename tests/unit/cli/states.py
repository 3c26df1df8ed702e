"""States of a batcher, as watching tests want them."""

from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1.inference_pb2 import PRIORITY_BATCH as BATCH
from loom.inference.v1.inference_pb2 import PRIORITY_INTERACTIVE as INTERACTIVE

MODEL = "sha256:" + "ab" * 32
BEGAN_MS = 1_700_000_000_000


def tenant(name="acme", *, prompt=0, generated=0, cached=0, weight=1.0, queued=0, running=0):
    return pb.Tenant(
        name=name,
        queued=queued,
        running=running,
        weight=weight,
        served_prompt_tokens=prompt,
        served_generated_tokens=generated,
        served_cached_tokens=cached,
    )


def state(after_s=0.0, *, tenants=(), arrived=0, **fields):
    """One at `after_s` seconds after the first."""
    counters = pb.Counters(arrived=arrived, **fields.pop("counters", {}))
    unix_ms = BEGAN_MS + round(after_s * 1000)
    return pb.State(unix_ms=unix_ms, tenants=tenants, counters=counters, **fields)


def busy(after_s=0.0, k=1):
    """A mesh under load; everything that is counted is `k` times what it is for `k` = 1."""
    queue = pb.Queue(
        model_version=MODEL,
        depth=12,
        prompt_tokens=12_345,
        oldest_wait_ms=3_500,
        running=16,
        dispatch_rate=12.5,
        depth_by_priority={"interactive": 2, "batch": 10},
        oldest_wait_ms_by_priority={"interactive": 120, "batch": 3_500},
        flows=[
            pb.Flow(priority=BATCH, tenant="acme", depth=10, virtual_tokens=900, weight=2),
            pb.Flow(priority=INTERACTIVE, tenant="zeta", depth=2, virtual_tokens=7, weight=1),
        ],
    )
    model = pb.WorkerModel(
        model_version=MODEL,
        state="ready",
        running=7,
        waiting=1,
        free_sequences=3,
        free_blocks=375,
        total_blocks=1_000,
        queued_prefill_tokens=2_048,
        prefill_tokens_per_s=5_123,
        decode_tokens_per_s=850,
        delay_s=0.42,
        known_prefixes=77,
        prefix_queried_tokens=1_000,
        prefix_hit_tokens=620,
    )
    here, gone = "127.0.0.1:21001", "127.0.0.1:21002"
    return state(
        after_s,
        arrived=100 * k,
        counters={"dispatched": 80 * k, "completed": 70 * k, "refused": {"QUEUE_FULL": 3 * k}},
        queues=[queue],
        workers=[
            pb.Worker(endpoint=here, alive=True, report_age_ms=12, leases=16, models=[model]),
            pb.Worker(endpoint=gone, alive=False),
        ],
        tenants=[
            tenant("zeta", prompt=100 * k, generated=100 * k, queued=2, running=1),
            tenant("acme", prompt=200 * k, generated=200 * k, cached=50 * k, weight=2, queued=10, running=15),
        ],
        leases=[pb.Lease(lease_id="l1", request_id="req-1", endpoint=here, tenant="acme", age_ms=12_345)],
        lease_count=16,
    )
