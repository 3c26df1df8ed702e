"""Whole runs: every request ends once, whatever the policy, and a run can be repeated."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.batcher.simulate import mesh as meshes
from services.batcher.simulate.bound import Bound
from services.batcher.simulate.mesh import Mesh
from services.batcher.simulate.metrics import Slo, summarise
from services.batcher.simulate.policies import POLICIES
from services.batcher.simulate.policies.base import Refuse
from services.batcher.simulate.policies.simple import RoundRobin
from services.batcher.simulate.reports import HEARTBEAT_S, REPORT_INTERVAL_S
from tests.unit.batcher_simulate.made import SLO, arrival, arrivals, policy, run, small

names = st.sampled_from(sorted(POLICIES))


@settings(max_examples=120, deadline=None)
@given(names, arrivals(count=15), st.integers(1, 3))
def test_every_request_is_decided_and_ends_once_and_all_blocks_come_back(name, made, workers):
    mesh, record = run(name, made, small(), workers)
    for number, each in enumerate(made):
        refused = number in record.refusals
        assert refused != (record.ended_at[number] >= 0)
        if not refused:
            assert 0 <= record.sent_to[number] < workers
            assert (
                each.at <= record.sent_at[number] <= record.first_token_at[number] <= record.ended_at[number]
            )
    for worker in mesh.workers:
        assert worker.kv.free == worker.kv.total_blocks
        assert not worker.sequences()
    served = [each for number, each in enumerate(made) if number not in record.refusals]
    assert sum(each.prompt_tokens for each in record.workers.values()) == sum(e.prompt_tokens for e in served)
    assert sum(each.generated_tokens for each in record.workers.values()) == sum(
        e.output_tokens for e in served
    )


@settings(max_examples=30, deadline=None)
@given(names, arrivals(count=15))
def test_a_run_is_the_same_whenever_it_is_repeated(name, made):
    one, other = (run(name, made, small(), 3)[1] for _ in range(2))
    assert vars(one) == vars(other)


@settings(max_examples=150, deadline=None)
@given(
    names, arrivals(count=30, within_s=1.0), st.integers(1, 2), st.floats(0.02, 1.0), st.floats(0.006, 0.03)
)
def test_no_policy_beats_the_bound(name, made, workers, ttft_s, itl_s):
    profile, slo = small(), Slo(ttft_s, itl_s)
    _, record = run(name, made, profile, workers, slo)
    result = summarise(name, 1.0, made, record, profile, slo, 0.0)
    bound = Bound(made, profile, workers, slo)
    assert result.good <= bound.good_max()
    assert result.good_share <= bound.good_share() + 1e-12


class Watched(RoundRobin):
    """Notes what it hears, and when."""

    def __init__(self, *, heartbeats):
        super().__init__(2)
        self.wants_heartbeats = heartbeats
        self.reports = [[], []]
        self.heard = []

    def reported(self, worker, report, now):
        self.reports[worker].append((now, report))
        return ()

    def first_token(self, number, now):
        self.heard.append(("first token", number, now))
        return ()

    def ended(self, number, usage, now):
        self.heard.append(("ended", number, now, usage))
        return super().ended(number, usage, now)


def watched(made, **options):
    chosen = Watched(**options)
    mesh = Mesh(made, chosen, small(), 2, SLO.ttft_s)
    return chosen, mesh.run()


def test_news_reach_the_policy_a_link_later():
    chosen, record = watched([arrival(0.0, 700, 30)], heartbeats=False)
    (_, number, first), (_, _, ended, usage) = chosen.heard
    assert number == 0
    assert first == pytest.approx(record.first_token_at[0] + meshes.LINK_S)
    assert ended == pytest.approx(record.ended_at[0] + meshes.LINK_S)
    assert usage == (700, 0, 30)
    (begun, _), (told, report) = chosen.reports[0][:2]
    assert (begun, report.active_request_ids) == (0.0, ("r0",))
    assert told == pytest.approx(REPORT_INTERVAL_S + meshes.LINK_S)


def test_reports_come_on_changes_apart_by_an_interval_and_otherwise_as_heartbeats():
    chosen, _ = watched([arrival(0.0, 2000, 200), arrival(0.3, 30, 300)], heartbeats=True)
    for reports in chosen.reports:
        gaps = [after[0] - before[0] for before, after in pairwise(reports[1:])]
        assert min(gaps) >= REPORT_INTERVAL_S - 1e-9
        assert max(gaps) <= HEARTBEAT_S + 1e-9


def test_reports_say_who_is_here_what_is_free_and_which_prefixes_are_found():
    made = [arrival(0.0, 1100, 100)]
    chosen, _ = watched(made, heartbeats=False)
    reports = [report for _, report in chosen.reports[0]]
    assert reports[0].news[0].prefix.whole
    assert any(report.active_request_ids == ("r0",) for report in reports)
    assert reports[-1].active_request_ids == ()
    assert min(report.models[0].free_blocks for report in reports) < reports[-1].models[0].total_blocks - 60
    stored = [
        page for report in reports for news in report.news if news.prefix for page in news.prefix.stored
    ]
    assert tuple(stored) == made[0].prefix
    served = [each for report in reports for news in report.news for each in news.served]
    assert [each.prompt_tokens for each in served] == sorted(each.prompt_tokens for each in served)
    assert served[-1].prompt_tokens == 1100


class Restless(RoundRobin):
    """Wants to be woken at a time that is over."""

    wakes = 0

    def next_wake(self):
        return -1.0

    def wake(self, now):
        self.wakes += 1
        return ()


def test_time_goes_on_whatever_a_policy_asks_for():
    made = [arrival(at / 10_000, 30, 20) for at in range(50)]
    restless = Restless(2)
    record = Mesh(made, restless, small(), 2, 2.0).run()
    assert min(record.ended_at) > 0
    assert 1 < restless.wakes <= max(record.ended_at) / meshes.WAKE_MIN_S + 2


class Refusing(RoundRobin):
    def arrived(self, number, request, now):
        return (Refuse(number, "QUEUE_FULL"),)


def test_a_refused_request_is_counted_by_its_reason_and_never_good():
    made, profile = [arrival(0.0), arrival(0.5)], small()
    record = Mesh(made, Refusing(2), profile, 2, 2.0).run()
    result = summarise("refusing", 1.0, made, record, profile, SLO, 0.0)
    assert (result.good, result.refusals, result.unfinished) == (0, {"QUEUE_FULL": 2}, 0)


class Twice(RoundRobin):
    def arrived(self, number, request, now):
        return (*super().arrived(number, request, now), *super().arrived(number, request, now))


def test_a_policy_that_decides_twice_is_caught():
    with pytest.raises(ValueError, match="decided before"):
        Mesh([arrival()], Twice(2), small(), 2, 2.0).run()


def test_a_run_ends_some_time_after_the_last_arrival(monkeypatch):
    monkeypatch.setattr(meshes, "DRAIN_MAX_S", 1.0)
    made, profile = [arrival(0.0, 100, 2000)], small()
    record = Mesh(made, policy("random", profile), profile, 2, 2.0).run()
    assert summarise("random", 1.0, made, record, profile, SLO, 0.0).unfinished == 1
