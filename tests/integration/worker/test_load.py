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
        # A listener that missed one hears everything instead of what changed.
        common = [n for n in ours.keys() & theirs.keys() if not whole(ours[n]) and not whole(theirs[n])]
        assert len(common) >= 5
        assert all(ours[n] == theirs[n] for n in common)


def whole(report: worker_pb2.LoadReport) -> bool:
    """Whether it says everything, as to a listener that did not hear the one before."""
    return any(model.prefix.whole for model in report.models)


def served(report: worker_pb2.LoadReport) -> dict[tuple[str, int], tuple[int, int]]:
    pairs = [pair for model in report.models for pair in model.served]
    return {(pair.tenant, pair.priority): (pair.prompt_tokens, pair.generated_tokens) for pair in pairs}


async def test_a_new_subscriber_is_told_at_once_what_every_tenant_was_served() -> None:
    async with run_worker() as worker:
        prompt = list(range(100, 140))
        for name, tenant, priority, count in (("a", "one", 2, 5), ("b", "one", 1, 6), ("c", "", 2, 7)):
            request = worker.client.request(
                name, tenant=tenant, priority=priority, prompt_token_ids=prompt, max_new_tokens=count
            )
            await worker.client.tokens(request)
        first = await worker.client.report_when(lambda _: True)
        assert served(first) == {("one", 2): (40, 5), ("one", 1): (8, 6), ("default", 2): (8, 7)}
        again = await worker.client.report_when(lambda _: True)
        assert served(again) == served(first)
        assert first.models[0].step_tokens_max == 512


async def test_served_tokens_come_at_most_four_times_a_second_and_only_when_they_changed() -> None:
    async with run_worker(report_interval_ms=5, heartbeat_ms=5) as worker:
        async with aclosing(worker.client.reports()) as reports:
            call = worker.client.start(worker.client.request(max_new_tokens=8000))
            running = (await take(reports, 200))[1:]
            call.cancel()
            async for report in reports:
                if not report.active_request_ids:
                    break
            ended = await take(reports, 150)
        told = [(r.unix_ms, served(r)["default", 2]) for r in running if served(r) and not whole(r)]
        assert len(told) >= 2
        assert all(b[0] - a[0] >= 250 for a, b in pairwise(told))
        assert all(a[1][1] < b[1][1] for a, b in pairwise(told)), "running sequences count"
        assert sum(bool(served(r)) for r in ended if not whole(r)) <= 1


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
