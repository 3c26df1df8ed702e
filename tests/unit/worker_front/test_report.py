"""What a load report says, and when it says what changed."""

from __future__ import annotations

import msgspec
from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.ports import ModelVersion
from services.worker.front.report import SERVED_EVERY_MS, Report, ReportBuilder
from services.worker.front.reservation import Reservation
from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from services.worker.front.served import PAIRS_MAX
from services.worker.protocol import Load, Output
from tests.unit.worker_front.fakes import READY, FakeLaunch, load, make_engine, make_sequence, step
from tokenloom.contract.prefix import WIRE_STRIDE
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import CallError

CLOCK = FakeClock()
VERSION = ModelVersion(f"sha256:{'a' * 64}", "m", 1000, 512)


BIG = msgspec.structs.replace(READY, total_blocks=3 * WIRE_STRIDE + 5)


def cached() -> Resident:
    """One whose cache has room for three prefixes."""
    model = resident()
    model.engine._on_event(BIG)
    return model


def resident(*, ready: bool = True) -> Resident:
    made = Resident(VERSION, make_engine(FakeLaunch(), clock=CLOCK), Reservation(123), min_dwell_s=100)
    made.granted.set()
    made.fetching = False
    if ready:
        made.engine._on_event(READY)
    return made


def build(
    builder: ReportBuilder, *held: tuple[Sequence, Resident], now_ms: int = 0, **parts: object
) -> Report:
    values = {"residents": [], "draining": False, **parts}
    return builder.build(held=held, unix_ms=now_ms, **values)  # type: ignore[arg-type]


def heard(report: Report, *, before: bool = True) -> pb.ResidentModel:
    """The only model, as who heard the report before, or did not, reads it."""
    published = report.changes() if before else report.everything()
    [model] = pb.WatchLoadResponse.FromString(published.SerializeToString()).report.models
    return model


def told(served: object) -> set[tuple[str, int, int, int]]:
    return {(s.tenant, s.priority, s.prompt_tokens, s.generated_tokens) for s in served}  # type: ignore[attr-defined]


def push(sequence: Sequence, tokens: int, cached: int = 0) -> None:
    sequence.push(Output(sequence.key, [1] * tokens, 0, cached_prompt_tokens=cached), 1)


def test_report_tells_what_the_next_arrival_may_use() -> None:
    model = resident()
    model.engine.admission.offer(make_sequence(prompt=16))
    model.engine.admission.settle(load(running=1, free_blocks=38))
    [said] = build(ReportBuilder("boot", lambda: 77), residents=[model]).message.report.models
    assert (said.version, said.name, said.state) == (VERSION.digest, "m", pb.MODEL_STATE_READY)
    assert (said.free_sequences, said.sequences_max, said.running) == (1, 2, 1)
    assert (said.free_blocks, said.total_blocks, said.block_tokens) == (38, 40, 16)
    assert said.memory_bytes == 123


def test_report_tells_memory_dwell_and_idleness() -> None:
    model = resident()
    builder = ReportBuilder("boot", lambda: 7, memory_budget_bytes=130, loads_on_demand=True)
    report = build(builder, residents=[model]).message.report
    assert (report.free_memory_bytes, report.memory_budget_bytes, report.loads_on_demand) == (7, 130, True)
    assert (report.models[0].dwell_left_ms, report.models[0].idle_ms) == (100_000, 0)
    CLOCK.advance(30)
    [said] = build(builder, residents=[model]).message.report.models
    assert (said.dwell_left_ms, said.idle_ms) == (70_000, 30_000)
    sequence = make_sequence()
    model.engine.admission.offer(sequence)
    CLOCK.advance(100)
    [said] = build(builder, residents=[model]).message.report.models
    assert (said.dwell_left_ms, said.idle_ms) == (0, 0)
    model.engine.cancel(sequence)
    CLOCK.advance(2)
    assert build(builder, residents=[model]).message.report.models[0].idle_ms == 2_000


def test_memory_that_a_model_waits_for_or_gave_back_is_not_reported_as_its_own() -> None:
    waits, left = resident(ready=False), resident()
    waits.granted.clear()
    left.released.set()
    said = build(ReportBuilder("boot", lambda: 0), residents=[waits, left]).message.report.models
    assert [model.memory_bytes for model in said] == [0, 0]


def test_report_tells_what_the_prefix_cache_holds_and_found() -> None:
    model, sequence = resident(), make_sequence(prompt=16)
    sequence.push(Output(sequence.key, [1], 0, cached_prompt_tokens=9), 1)
    model.engine.tally.began(sequence)
    model.engine.admission.settle(Load(1, 0, 1, 30, 0, 0.0, 0.0, cached_blocks=12))
    [said] = build(ReportBuilder("boot", lambda: 0), residents=[model]).message.report.models
    assert (said.cached_blocks, said.prefix_queried_tokens, said.prefix_hit_tokens) == (12, 16, 9)


def test_model_that_cannot_serve_offers_nothing() -> None:
    loading = resident(ready=False)
    failed = resident()
    failed.failure = CallError("DIGEST_MISMATCH", "two\nlines")
    for model, state in ((loading, pb.MODEL_STATE_LOADING), (failed, pb.MODEL_STATE_FAILED)):
        [said] = build(ReportBuilder("boot", lambda: 0), residents=[model]).message.report.models
        assert (said.state, said.free_sequences, said.free_blocks) == (state, 0, 0)
    assert said.error == "two lines"


def test_report_tells_how_many_tokens_a_step_may_hold() -> None:
    model = resident()
    assert heard(build(ReportBuilder("boot", lambda: 0), residents=[model])).step_tokens_max == 512


def test_reports_of_one_boot_are_numbered() -> None:
    builder, model = ReportBuilder("boot", lambda: 5), resident()
    held = make_sequence(request_id="r"), model
    reports = [build(builder, held, draining=True).message.report for _ in range(3)]
    assert [report.sequence for report in reports] == [1, 2, 3]
    assert (reports[0].boot_id, reports[0].draining, reports[0].free_memory_bytes) == ("boot", True, 5)
    assert list(reports[0].active_request_ids) == ["r"]


def test_served_tokens_are_those_of_ended_and_running_sequences_by_tenant_and_band() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), resident()
    ended = make_sequence(100, tenant="one")
    push(ended, 4, cached=64)
    model.engine.served.count(ended)
    running, other = make_sequence(10, tenant="one"), make_sequence(10, tenant="one", priority=1)
    waiting = make_sequence(50, tenant="two")
    push(running, 3)
    push(other, 1, cached=9)
    held = [(sequence, model) for sequence in (running, other, waiting)]
    assert told(heard(build(builder, *held, residents=[model])).served) == {
        ("one", 2, 36 + 10, 4 + 3),
        ("one", 1, 1, 1),
    }


def test_served_tokens_come_at_most_so_often_and_only_those_that_changed() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), resident()
    one, two = make_sequence(10, tenant="one"), make_sequence(10, tenant="two")
    held = [(one, model), (two, model)]
    push(one, 1)
    push(two, 1)

    def at(now_ms: int) -> set[tuple[str, int, int, int]]:
        return told(heard(build(builder, *held, residents=[model], now_ms=now_ms)).served)

    assert at(1000) == {("one", 2, 10, 1), ("two", 2, 10, 1)}
    push(one, 5)
    assert at(1000 + SERVED_EVERY_MS - 1) == set()
    assert at(1000 + SERVED_EVERY_MS) == {("one", 2, 10, 6)}
    assert at(1000 + 2 * SERVED_EVERY_MS) == set()
    push(two, 1)
    assert at(500) == {("two", 2, 10, 2)}, "a clock that was set back silences nothing"


def test_who_did_not_hear_the_report_before_is_told_everything_that_was_served() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), resident()
    sequence = make_sequence(10, tenant="one")
    push(sequence, 2)
    build(builder, (sequence, model), residents=[model])
    report = build(builder, (sequence, model), residents=[model])
    assert told(heard(report).served) == set()
    assert told(heard(report, before=False).served) == {("one", 2, 10, 2)}


def test_a_sequence_that_ended_stays_counted_once() -> None:
    model, sequence = resident(), make_sequence(10, tenant="one")
    served = model.engine.served
    push(sequence, 2)
    served.count(sequence)
    served.count(sequence)
    push(sequence, 1)
    served.count(sequence)
    assert told(served.all()) == {("one", 2, 10, 3)}


def test_tenants_are_bounded_and_those_that_changed_last_are_kept() -> None:
    served = resident().engine.served
    first = make_sequence(tenant="t0")
    push(first, 1)
    served.count(first)
    for number in range(1, PAIRS_MAX):
        sequence = make_sequence(tenant=f"t{number}")
        push(sequence, 1)
        served.count(sequence)
    push(first, 1)
    served.count(first)
    late = make_sequence(tenant="late")
    push(late, 1)
    served.count(late)
    tenants = [pair.tenant for pair in served.all()]
    assert len(tenants) == PAIRS_MAX
    assert (tenants[0], tenants[-2:]) == ("t2", ["t0", "late"])
    assert {pair.tenant for pair in served.take()} == set(tenants)


def stored(model: Resident, *prefixes: int, evicted: tuple[int, ...] = ()) -> None:
    said = step(free_blocks=40)
    changes = {"prefixes_stored": list(prefixes), "prefixes_evicted": list(evicted)}
    model.engine._on_event(msgspec.structs.replace(said, **changes))


def test_a_models_first_report_says_that_its_prefixes_are_all_there_is() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), cached()
    stored(model, 5)
    first = heard(build(builder, residents=[model])).prefix
    assert (first.whole, list(first.stored), list(first.evicted)) == (True, [5], [])
    assert not heard(build(builder, residents=[model])).HasField("prefix")


def test_a_report_tells_what_changed_since_the_one_before() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), cached()
    stored(model, 1, 2)
    build(builder, residents=[model])
    stored(model, 3, 4, evicted=(1,))
    stored(model, 1, evicted=(4, 2))
    changes = heard(build(builder, residents=[model])).prefix
    assert (changes.whole, list(changes.stored), list(changes.evicted)) == (False, [3], [2])


def test_everything_is_what_was_cached_when_the_report_was_built() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), cached()
    stored(model, 1, 2)
    report = build(builder, residents=[model])
    stored(model, 3, evicted=(1,))
    whole = heard(report, before=False).prefix
    assert (whole.whole, set(whole.stored)) == (True, {1, 2})
    changes = heard(build(builder, residents=[model])).prefix
    assert (changes.whole, list(changes.stored), list(changes.evicted)) == (False, [3], [1])


def test_an_engine_that_died_has_no_prefixes_and_the_next_report_says_so() -> None:
    builder, model = ReportBuilder("boot", lambda: 0), cached()
    stored(model, 1, 2)
    report = build(builder, residents=[model])
    model.engine._bury("killed")
    assert heard(report, before=False).prefix.whole
    assert not heard(report, before=False).prefix.stored
    gone = heard(build(builder, residents=[model])).prefix
    assert (gone.whole, list(gone.stored)) == (True, [])
    model.engine._on_event(BIG)
    stored(model, 2)
    again = heard(build(builder, residents=[model])).prefix
    assert (again.whole, list(again.stored)) == (True, [2])


def test_prefixes_are_bounded_by_the_cache() -> None:
    model = cached()
    stored(model, *range(100))
    stored(model, 200, evicted=(0,))
    model.engine.prefixes.take()
    assert model.engine.prefixes.told().stored == [1, 2, 200]
