"""What a load report says, made from the front's state: no clock, no loop, no sockets.

Generated tokens by tenant are added up only when they are due, `TENANTS_EVERY_MS` apart, so that a
token costs nothing here; between those times the map is left out, which means "no news".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.models import Resident, Stage
from services.worker.front.sequence import Sequence

TENANTS_EVERY_MS = 250
TENANTS_MAX = 1024
"""Tenants whose counters are kept; beyond that the one that ended a sequence longest ago is forgotten."""
ACTIVE_IDS_MAX = 8192
"""Request ids in one report; the engines hold fewer."""

STATES = {
    Stage.FETCHING: pb.MODEL_STATE_FETCHING,
    Stage.LOADING: pb.MODEL_STATE_LOADING,
    Stage.READY: pb.MODEL_STATE_READY,
    Stage.DRAINING: pb.MODEL_STATE_DRAINING,
    Stage.FAILED: pb.MODEL_STATE_FAILED,
}


class TenantTokens:
    """Tokens generated since boot, by tenant: those of ended sequences here, of running ones there."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, int] = OrderedDict()

    def ended(self, sequence: Sequence) -> None:
        """A sequence is over: keep what it gave."""
        self._ended[sequence.tenant] = self._ended.get(sequence.tenant, 0) + sequence.received
        self._ended.move_to_end(sequence.tenant)
        if len(self._ended) > TENANTS_MAX:
            self._ended.popitem(last=False)

    def totals(self, running: Iterable[Sequence]) -> dict[str, int]:
        """By tenant, with what the running sequences gave so far."""
        totals = dict(self._ended)
        for sequence in running:
            totals[sequence.tenant] = totals.get(sequence.tenant, 0) + sequence.received
        return totals


def resident_model(resident: Resident) -> pb.ResidentModel:
    """One model's part of the report."""
    engine, version = resident.engine, resident.version
    admission, load = engine.admission, engine.admission.load
    message = pb.ResidentModel(
        version=version.digest,
        name=version.name,
        state=STATES[resident.stage],
        progress=resident.progress,
        running=admission.running,
        waiting=admission.waiting,
        queued_prefill_tokens=load.queued_prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        cached_blocks=load.cached_blocks,
        prefix_queried_tokens=engine.tally.prompt_tokens,
        prefix_hit_tokens=engine.tally.cached_tokens,
    )
    if (error := resident.error) is not None:
        message.error = " ".join(error.message.split())
    if engine.ready is not None:
        message.block_tokens = engine.ready.block_tokens
        message.total_blocks = engine.ready.total_blocks
        message.sequences_max = engine.ready.sequences_max
        message.memory_bytes = engine.ready.memory_bytes
    if resident.stage is Stage.READY:
        message.free_sequences = admission.free_sequences()
        message.free_blocks = admission.free_blocks()
    return message


class ReportBuilder:
    """Makes the reports of one boot, numbered from 1."""

    def __init__(self, boot_id: str, free_memory_bytes: Callable[[], int]) -> None:
        self.boot_id = boot_id
        self._free_memory_bytes = free_memory_bytes
        self._sequence = 0
        self._tenants_due_ms = 0

    def build(
        self,
        *,
        residents: Iterable[Resident],
        sequences: Iterable[Sequence],
        tenants: TenantTokens,
        draining: bool,
        unix_ms: int,
    ) -> pb.LoadReport:
        """The next report. `sequences` are all that the worker holds, waiting ones included."""
        held = list(sequences)
        self._sequence += 1
        report = pb.LoadReport(
            boot_id=self.boot_id,
            sequence=self._sequence,
            draining=draining,
            models=[resident_model(resident) for resident in residents],
            active_request_ids=[sequence.request_id for sequence in held[:ACTIVE_IDS_MAX]],
            free_memory_bytes=self._free_memory_bytes(),
            unix_ms=unix_ms,
        )
        if unix_ms >= self._tenants_due_ms:
            self._tenants_due_ms = unix_ms + TENANTS_EVERY_MS
            report.generated_tokens_by_tenant.update(tenants.totals(held))
        return report
