"""What a load report says, and how often it says it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.models import Resident
from services.worker.front.ports import ModelVersion
from services.worker.front.publisher import Publisher
from services.worker.front.report import TENANTS_EVERY_MS, TENANTS_MAX, ReportBuilder, TenantTokens
from services.worker.front.sequence import Sequence
from services.worker.protocol import Load, Output
from tests.unit.worker_front.fakes import READY, FakeLaunch, load, make_engine, make_sequence, until
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.errors import CallError

VERSION = ModelVersion(f"sha256:{'a' * 64}", "m", 1000, 512)


def resident(*, ready: bool = True) -> Resident:
    made = Resident(VERSION, make_engine(FakeLaunch()))
    made.fetching = False
    if ready:
        made.engine._on_event(READY)
    return made


def build(builder: ReportBuilder, *sequences: Sequence, now_ms: int = 0, **parts: object) -> pb.LoadReport:
    values = {"residents": [], "tenants": TenantTokens(), "draining": False, **parts}
    return builder.build(sequences=sequences, unix_ms=now_ms, **values)  # type: ignore[arg-type]


def with_tokens(count: int, tenant: str) -> Sequence:
    sequence = make_sequence(tenant=tenant)
    sequence.push(Output(sequence.key, [1] * count, 0), 1)
    return sequence


def test_report_tells_what_the_next_arrival_may_use() -> None:
    model = resident()
    model.engine.admission.offer(make_sequence(prompt=16))
    model.engine.admission.settle(load(running=1, free_blocks=38))
    [said] = build(ReportBuilder("boot", lambda: 77), residents=[model]).models
    assert (said.version, said.name, said.state) == (VERSION.digest, "m", pb.MODEL_STATE_READY)
    assert (said.free_sequences, said.sequences_max, said.running) == (1, 2, 1)
    assert (said.free_blocks, said.total_blocks, said.block_tokens) == (38, 40, 16)
    assert said.memory_bytes == 123


def test_report_tells_what_the_prefix_cache_holds_and_found() -> None:
    model, sequence = resident(), make_sequence(prompt=16)
    sequence.push(Output(sequence.key, [1], 0, cached_prompt_tokens=9), 1)
    model.engine.tally.began(sequence)
    model.engine.admission.settle(Load(1, 0, 1, 30, 0, 0.0, 0.0, cached_blocks=12))
    [said] = build(ReportBuilder("boot", lambda: 0), residents=[model]).models
    assert (said.cached_blocks, said.prefix_queried_tokens, said.prefix_hit_tokens) == (12, 16, 9)


def test_model_that_cannot_serve_offers_nothing() -> None:
    loading = resident(ready=False)
    failed = resident()
    failed.failure = CallError("DIGEST_MISMATCH", "two\nlines")
    for model, state in ((loading, pb.MODEL_STATE_LOADING), (failed, pb.MODEL_STATE_FAILED)):
        [said] = build(ReportBuilder("boot", lambda: 0), residents=[model]).models
        assert (said.state, said.free_sequences, said.free_blocks) == (state, 0, 0)
    assert said.error == "two lines"


def test_reports_of_one_boot_are_numbered() -> None:
    builder = ReportBuilder("boot", lambda: 5)
    reports = [build(builder, make_sequence(request_id="r"), draining=True) for _ in range(3)]
    assert [report.sequence for report in reports] == [1, 2, 3]
    assert (reports[0].boot_id, reports[0].draining, reports[0].free_memory_bytes) == ("boot", True, 5)
    assert list(reports[0].active_request_ids) == ["r"]


def test_tenant_counters_hold_ended_and_running_sequences_and_only_grow() -> None:
    builder, tenants = ReportBuilder("boot", lambda: 0), TenantTokens()
    running, ended = with_tokens(3, "one"), with_tokens(4, "one")
    tenants.ended(ended)
    first = build(builder, running, tenants=tenants)
    assert dict(first.generated_tokens_by_tenant) == {"one": 7}
    tenants.ended(running)
    soon = build(builder, tenants=tenants, now_ms=TENANTS_EVERY_MS - 1)
    assert not soon.generated_tokens_by_tenant
    later = build(builder, tenants=tenants, now_ms=TENANTS_EVERY_MS)
    assert dict(later.generated_tokens_by_tenant) == {"one": 7}


def test_tenants_are_bounded() -> None:
    tenants = TenantTokens()
    for number in range(TENANTS_MAX + 10):
        tenants.ended(with_tokens(1, f"t{number}"))
    totals = tenants.totals([])
    assert len(totals) == TENANTS_MAX
    assert "t0" not in totals


def counting() -> tuple[list[int], Publisher]:
    built: list[int] = []

    def build_next() -> bytes:
        built.append(len(built))
        return bytes([len(built)])

    return built, Publisher(build_next, SystemClock(), report_interval_s=0.02, heartbeat_s=0.04)


async def test_new_listener_hears_the_present_state_at_once() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        assert (await anext(reports)).SerializeToString() == b"\x01"
        assert built == [0]
    await publisher.close()


async def test_all_listeners_get_the_same_built_report() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as one, aclosing(publisher.listen()) as two:
        await asyncio.gather(anext(one), anext(two))
        before = len(built)
        ours, theirs = await asyncio.gather(anext(one), anext(two))
        assert ours is theirs
        assert len(built) == before + 1
    await publisher.close()


async def test_a_change_is_pushed_long_before_the_heartbeat() -> None:
    built: list[int] = []

    def build_next() -> bytes:
        built.append(len(built))
        return bytes([len(built)])

    publisher = Publisher(build_next, SystemClock(), report_interval_s=0.001, heartbeat_s=600)
    async with asyncio.timeout(5), aclosing(publisher.listen()) as reports:
        await anext(reports)
        for count in (2, 3):
            publisher.changed()
            publisher.changed()
            assert (await anext(reports)).SerializeToString() == bytes([count])
    await publisher.close()


async def test_a_change_is_not_lost_when_a_new_listener_is_served_first() -> None:
    built, publisher = counting()
    async with asyncio.timeout(5), aclosing(publisher.listen()) as one:
        await anext(one)
        publisher._heartbeat_s = 600
        await until(lambda: publisher._due_in_s() <= 0)
        publisher.changed()
        async with aclosing(publisher.listen()) as two:
            await anext(two)
            count = len(built)
            publisher.changed()
            await until(lambda: len(built) > count)
    await publisher.close()


async def test_reports_go_on_after_one_that_could_not_be_built() -> None:
    seen: list[int] = []
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))

    def build_next() -> bytes:
        seen.append(len(seen))
        if len(seen) == 2:
            raise ZeroDivisionError
        return bytes([len(seen)])

    publisher = Publisher(build_next, SystemClock(), report_interval_s=0.001, heartbeat_s=0.01)
    async with asyncio.timeout(5), aclosing(publisher.listen()) as reports:
        await anext(reports)
        assert (await anext(reports)).SerializeToString() == b"\x03"
    assert len(failures) == 1
    await publisher.close()


async def test_nothing_is_built_while_nobody_listens() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        await anext(reports)
    count = len(built)
    publisher.changed()
    await asyncio.sleep(0.06)
    assert (len(built), publisher.listeners) == (count, 0)


async def test_slow_listener_skips_to_the_newest() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        await anext(reports)
        await until(lambda: len(built) >= 4)
        assert (await anext(reports)).SerializeToString() == bytes([len(built)])
    await publisher.close()


async def test_close_ends_every_listener() -> None:
    _, publisher = counting()

    async def listen() -> int:
        return len([report async for report in publisher.listen()])

    listening = asyncio.create_task(listen())
    await until(lambda: publisher.listeners == 1)
    await publisher.close()
    assert await asyncio.wait_for(listening, 5) >= 0
