"""What the batcher's bench reads from an outcome, on outcomes made by hand."""

import random
from itertools import pairwise

import pytest

from tools import bench_batcher_cases as cases
from tools.bench_batcher import holds
from tools.bench_batcher_load import Ask, Seen
from tools.bench_batcher_mesh import Access, Outcome, Setup


def outcome(asks, seen, access=(), window=(0.0, 10.0)):
    return Outcome(
        asks=asks,
        seen=seen,
        access=list(access),
        start_unix_s=0.0,
        window=window,
        cpu_s={"batcher": 1.0, "machine": 4.0},
        core={"request_arrived": (10, 0.1)},
        reports=50,
        bypassed=0,
        load_cpu_s=1.0,
    )


def seen(*tokens):
    return Seen(tokens[0][0], tokens[-1][0], "", list(tokens))


def access(index, start_s, pick_us):
    return Access(index, start_s, "lease", "a:1", "a:1", pick_us, 300)


def missed(figures, bars):
    return [name for name, sign, bound in bars if not holds(figures[name], sign, bound)]


def test_jains_index_is_one_for_equals_and_one_nth_for_a_monopoly():
    assert cases.jain([3, 3, 3]) == pytest.approx(1)
    assert cases.jain([9, 0, 0]) == pytest.approx(1 / 3)


def test_tokens_count_only_while_every_tenant_has_something_waiting():
    asks = [Ask(0, "plug", 2, 5, 2), Ask(0, "a", 2, 10, 2), Ask(0, "a", 2, 20, 1), Ask(0, "b", 2, 40, 2)]
    times = [seen((0.5, 1)), seen((1.0, 1), (4.0, 1)), seen((5.0, 1)), seen((2.0, 1), (3.0, 1))]
    tokens, lasted_s = cases.served_tokens(outcome(asks, times))
    assert lasted_s == pytest.approx(1.0), "from a's first to b's last first token"
    assert tokens == {"a": 11, "b": 41}


def test_an_interactive_request_counts_those_that_were_picked_before_it():
    asks = [Ask(0, "batch", 3, 1, 1), Ask(0, "batch", 3, 1, 1), Ask(1, "person", 1, 1, 1)]
    times = [seen((3.0, 1))] * 3
    lines = [access(0, 0.0, 2_000_000), access(1, 0.0, 2_600_000), access(2, 1.0, 1_500_000)]
    figures, bars = cases.behind_figures(outcome(asks, times, lines))
    assert (figures["queued_before_it"], figures["picked_before_it"]) == (2, 1)
    assert missed(figures, bars) == ["picked_before_it"]


def test_a_burst_misses_its_bars_when_a_request_went_without_a_lease():
    asks = [Ask(0, "a", 2, 1, 1)] * 2
    lines = [access(0, 0.0, 900), Access(1, 0.0, "", "", "a:1", None, 0)]
    figures, bars = cases.burst_figures(outcome(asks, [seen((1.0, 1))] * 2, lines))
    assert missed(figures, bars) == ["without_lease"]


def test_cpu_of_a_pick_is_that_of_the_window_by_its_requests():
    asks = [Ask(0, "a", 2, 1, 1)] * 4
    times = [seen((1.0, 1)), seen((2.0, 1)), seen((3.0, 1)), seen((11.0, 1))]
    figures, _ = cases.pick_figures(outcome(asks, times, [access(n, 0.0, 1000) for n in range(4)]))
    assert (figures["requests"], figures["reports_per_s"]) == (3, 5.0)
    assert figures["batcher_ms_per_request"] == pytest.approx(1e3 / 3)
    assert figures["core_ms_per_request"] == pytest.approx(100 / 3)
    assert figures["foreign_cores"] == pytest.approx(0.2)


def test_paced_tenants_are_never_above_their_rate():
    times = cases.paced(4.0, 30.0, random.Random(1))
    assert all(0.2 <= late - early <= 0.3 for early, late in pairwise(times))
    assert len(times) == pytest.approx(120, abs=3)


def test_no_figure_that_is_missing_or_no_number_meets_a_bar():
    assert not holds(float("nan"), "<=", 1.0)
    assert not holds("none", "<=", 1.0)
    assert holds(1, "<=", 1.0)
    assert not holds(0.97, ">=", 0.98)


def test_a_meshs_settings_are_those_that_up_reads():
    environ = Setup(1, {"SEQUENCES_MAX": 8}, {"TENANT_WEIGHTS": "{}"}).environ()
    assert environ["TOKENLOOM_WORKER_SEQUENCES_MAX"] == "8"
    assert environ["TOKENLOOM_BATCHER_TENANT_WEIGHTS"] == "{}"
