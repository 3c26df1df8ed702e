"""What a load report says, made from the front's state: no clock, no loop, no sockets.

What tenants were served and which prefixes are cached is told when it changed, the former
`SERVED_EVERY_MS` apart at least; otherwise it is left out, which means "no news".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice
from math import ceil

from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.prefixes import PrefixNews
from services.worker.front.publisher import Published
from services.worker.front.resident import Resident, Stage
from services.worker.front.sequence import Sequence
from services.worker.front.served import Served

SERVED_EVERY_MS = 250
ACTIVE_IDS_MAX = 8192
"""Request ids in one report; the engines hold fewer."""

STATES = {
    Stage.FETCHING: pb.MODEL_STATE_FETCHING,
    Stage.LOADING: pb.MODEL_STATE_LOADING,
    Stage.READY: pb.MODEL_STATE_READY,
    Stage.DRAINING: pb.MODEL_STATE_DRAINING,
    Stage.FAILED: pb.MODEL_STATE_FAILED,
}


def resident_model(resident: Resident) -> pb.ResidentModel:
    """One model's part of the report, without what is told only when it changed."""
    engine, version = resident.engine, resident.version
    admission, load = engine.admission, engine.admission.load
    message = pb.ResidentModel(
        version=version.digest,
        name=version.name,
        state=STATES[resident.stage],
        progress=resident.progress,
        running=admission.running,
        waiting=admission.waiting,
        queued_prefill_tokens=engine.queued_prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        cached_blocks=load.cached_blocks,
        prefix_queried_tokens=engine.tally.prompt_tokens,
        prefix_hit_tokens=engine.tally.cached_tokens,
        memory_bytes=resident.reserved_bytes,
        dwell_left_ms=ceil(1000 * resident.dwell_left_s),
        idle_ms=int(1000 * resident.idle_s),
    )
    if (error := resident.error) is not None:
        message.error = " ".join(error.message.split())
    if engine.ready is not None:
        message.block_tokens = engine.ready.block_tokens
        message.total_blocks = engine.ready.total_blocks
        message.sequences_max = engine.ready.sequences_max
        message.step_tokens_max = engine.ready.step_tokens_max
    if resident.stage is Stage.READY:
        message.free_sequences = admission.free_sequences()
        message.free_blocks = admission.free_blocks()
    return message


class Report:
    """One report, in the two forms that its listeners need. `message` holds the changes."""

    __slots__ = ("_changes", "_everything", "_residents", "message")

    def __init__(self, message: pb.WatchLoadResponse, residents: list[Resident]) -> None:
        """`residents` are those of the message's models, in their order."""
        self.message = message
        self._residents = residents
        self._changes: Published | None = None
        self._everything: Published | None = None

    @property
    def number(self) -> int:
        """From 1, within one boot."""
        return self.message.report.sequence

    def changes(self) -> Published:
        """What changed since the report before it."""
        if self._changes is None:
            self._changes = Published(self.message.SerializeToString())
        return self._changes

    def everything(self) -> Published:
        """All that there is to tell; to be asked for before the next report is built."""
        if self._everything is None:
            message = pb.WatchLoadResponse.FromString(self.changes().SerializeToString())
            for model, resident in zip(message.report.models, self._residents, strict=True):
                model.ClearField("prefix")
                model.ClearField("served")
                _tell(model, resident.engine.prefixes.told(), resident.engine.served.all())
            self._everything = Published(message.SerializeToString())
        return self._everything


def _tell(model: pb.ResidentModel, prefix: PrefixNews | None, served: Iterable[Served]) -> None:
    if prefix is not None:
        model.prefix.whole = prefix.whole
        model.prefix.stored.extend(prefix.stored)
        model.prefix.evicted.extend(prefix.evicted)
    for one in served:
        model.served.add(
            tenant=one.tenant,
            priority=inference_pb2.Priority.ValueType(one.priority),
            prompt_tokens=one.prompt_tokens,
            generated_tokens=one.generated_tokens,
        )


class ReportBuilder:
    """Makes the reports of one boot, numbered from 1."""

    def __init__(
        self,
        boot_id: str,
        free_memory_bytes: Callable[[], int],
        *,
        memory_budget_bytes: int = 0,
        loads_on_demand: bool = False,
    ) -> None:
        self.boot_id = boot_id
        self._free_memory_bytes = free_memory_bytes
        self._memory_budget_bytes = memory_budget_bytes
        self._loads_on_demand = loads_on_demand
        self._sequence = 0
        self._served_due_ms = 0

    def build(
        self,
        *,
        residents: Iterable[Resident],
        held: Collection[tuple[Sequence, Resident]],
        draining: bool,
        unix_ms: int,
    ) -> Report:
        """The next report. `held` are all sequences of the worker, waiting ones included."""
        self._sequence += 1
        models = list(residents)
        ids = (sequence.request_id for sequence, _ in held)
        report = pb.LoadReport(
            boot_id=self.boot_id,
            sequence=self._sequence,
            draining=draining,
            models=map(resident_model, models),
            active_request_ids=islice(ids, ACTIVE_IDS_MAX),
            free_memory_bytes=self._free_memory_bytes(),
            unix_ms=unix_ms,
            memory_budget_bytes=self._memory_budget_bytes,
            loads_on_demand=self._loads_on_demand,
        )
        served_due = self._served_due(unix_ms)
        if served_due:
            for sequence, resident in held:
                resident.engine.served.count(sequence)
        for message, resident in zip(report.models, models, strict=True):
            engine = resident.engine
            _tell(message, engine.prefixes.take(), engine.served.take() if served_due else ())
        return Report(pb.WatchLoadResponse(report=report), models)

    def _served_due(self, unix_ms: int) -> bool:
        # A clock that was set back must not silence it for long.
        if 0 < self._served_due_ms - unix_ms <= SERVED_EVERY_MS:
            return False
        self._served_due_ms = unix_ms + SERVED_EVERY_MS
        return True
