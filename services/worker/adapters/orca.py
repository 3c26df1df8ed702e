"""Load in the words of `xds.service.orca.v3.OpenRcaService`, for pickers that speak ORCA.

Pull-free: the client opens one stream and gets a small report each interval it asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

from services.worker.front.resident import Resident, Stage
from services.worker.metrics import kv_usage
from tokenloom.kit.server import Call

INTERVAL_MIN_S = 0.1
INTERVAL_MAX_S = 60.0
INTERVAL_DEFAULT_S = 1.0
SERVICE = orca_pb2.DESCRIPTOR.services_by_name["OpenRcaService"]


class OrcaServicer:
    """`xds.service.orca.v3.OpenRcaService`."""

    def __init__(self, residents: Callable[[], Iterable[Resident]]) -> None:
        self._residents = residents

    async def StreamCoreMetrics(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """One report each `report_interval`, kept between 0.1 and 60 s; 1 s when none is given."""
        asked_s = request.report_interval.ToNanoseconds() / 1e9 or INTERVAL_DEFAULT_S
        interval_s = min(max(asked_s, INTERVAL_MIN_S), INTERVAL_MAX_S)
        while True:
            yield orca_report(self._residents())
            await asyncio.sleep(interval_s)


def orca_report(residents: Iterable[Resident]) -> Any:
    """Utilisation of the fullest model, and the counts of all, as named metrics."""
    report = orca_load_report_pb2.OrcaLoadReport()
    running = waiting = 0
    for resident in residents:
        if resident.stage is not Stage.READY or resident.engine.ready is None:
            continue
        admission, usage = resident.engine.admission, kv_usage(resident)
        held = len(admission.active) + admission.queued
        places = held / resident.engine.ready.sequences_max
        running += len(admission.active)
        waiting += admission.queued
        report.application_utilization = max(report.application_utilization, usage, places)
        report.utilization[f"kv_cache.{resident.version.name}"] = usage
    report.named_metrics["num_requests_running"] = running
    report.named_metrics["num_requests_waiting"] = waiting
    return report
