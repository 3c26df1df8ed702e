"""Load reports: on change, as heartbeat, shared by all listeners; ORCA beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise

from google.protobuf.message import Message
from loom.worker.v1 import worker_pb2
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

from tests.integration.worker.harness import Client, run_worker
from tokenloom.kit.channels import open_channel


async def take(reports: AsyncIterator[worker_pb2.LoadReport], count: int) -> list[worker_pb2.LoadReport]:
    taken: list[worker_pb2.LoadReport] = []
    async for report in reports:
        taken.append(report)
        if len(taken) == count:
            return taken
    raise AssertionError("the reports ended")


async def test_heartbeat_comes_without_any_change() -> None:
    async with run_worker(heartbeat_ms=30) as worker, aclosing(worker.client.reports()) as reports:
        await take(reports, 5)
        began = time.monotonic()
        beats = await take(reports, 10)
        assert 0.2 < time.monotonic() - began < 2
        assert [b.sequence - a.sequence for a, b in pairwise(beats)] == [1] * 9
        assert len({beat.boot_id for beat in beats}) == 1
        assert beats[-1].free_memory_bytes > 0
        assert abs(beats[-1].unix_ms / 1000 - time.time()) < 5


async def test_change_is_reported_long_before_the_heartbeat() -> None:
    async with (
        run_worker(heartbeat_ms=10_000, sim_step_ms=20) as worker,
        aclosing(worker.client.reports()) as reports,
    ):
        await take(reports, 1)
        call = worker.client.start(worker.client.request("changes", max_new_tokens=500))
        async for report in reports:
            if "changes" in report.active_request_ids:
                break
        assert report.models[0].free_sequences == 63
        call.cancel()
        async for report in reports:
            if not report.active_request_ids:
                break
        assert report.models[0].free_sequences == 64


async def test_reports_keep_their_least_distance_under_many_changes() -> None:
    async with run_worker(report_interval_ms=50, heartbeat_ms=50, sim_step_ms=0) as worker:
        async with aclosing(worker.client.reports()) as reports:
            before = (await take(reports, 1))[0]
            began = time.monotonic()
            for n in range(60):
                await worker.client.tokens(worker.client.request(f"r{n}", max_new_tokens=1))
            passed_s = time.monotonic() - began
            after = (await take(reports, 1))[0]
        assert after.sequence - before.sequence <= passed_s / 0.05 + 2


async def test_listeners_share_reports() -> None:
    async with run_worker() as worker:
        other_channel = open_channel(f"127.0.0.1:{worker.app.port}")
        async with (
            aclosing(worker.client.reports()) as one,
            aclosing(Client(other_channel).reports()) as two,
        ):
            taken = await asyncio.gather(take(one, 10), take(two, 10))
            ours, theirs = ({report.sequence: report for report in reports} for reports in taken)
        await other_channel.close(None)
        common = ours.keys() & theirs.keys()
        assert len(common) >= 5
        assert all(ours[n] == theirs[n] for n in common)


async def test_generated_tokens_are_counted_for_each_tenant() -> None:
    async with run_worker() as worker:
        await worker.client.tokens(worker.client.request("a", tenant="one", max_new_tokens=5))
        await worker.client.tokens(worker.client.request("b", tenant="one", max_new_tokens=6))
        await worker.client.tokens(worker.client.request("c", max_new_tokens=7))
        report = await worker.client.report_when(lambda r: bool(r.generated_tokens_by_tenant))
        assert dict(report.generated_tokens_by_tenant) == {"one": 11, "default": 7}


async def test_tenant_counters_come_at_most_four_times_a_second() -> None:
    async with run_worker(report_interval_ms=5, heartbeat_ms=5) as worker:
        await worker.client.tokens(worker.client.request())
        async with aclosing(worker.client.reports()) as reports:
            seen = [r.unix_ms for r in await take(reports, 150) if r.generated_tokens_by_tenant]
        assert all(b - a >= 250 for a, b in pairwise(seen))


async def test_measured_speeds_are_reported() -> None:
    async with run_worker(sim_step_ms=1, sim_prefill_tokens_per_s=5000) as worker:
        await worker.client.tokens(worker.client.request(prompt_token_ids=[1] * 500, max_new_tokens=50))
        report = await worker.client.report_when(lambda r: r.models[0].decode_tokens_per_s > 0)
        assert 1000 < report.models[0].prefill_tokens_per_s < 6000
        assert 100 < report.models[0].decode_tokens_per_s <= 1001


async def test_orca_stream_tells_utilisation() -> None:
    async with run_worker(sequences_max=4) as worker:
        busy = worker.client.start(worker.client.request(max_new_tokens=8000))
        await busy.read()
        stream = worker.channel.unary_stream(
            "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
            request_serializer=Message.SerializeToString,
            response_deserializer=orca_load_report_pb2.OrcaLoadReport.FromString,
        )
        call = stream(orca_pb2.OrcaLoadReportRequest())
        report = await call.read()
        assert report.application_utilization == 0.25
        assert report.named_metrics["num_requests_running"] == 1
        call.cancel()
        busy.cancel()
