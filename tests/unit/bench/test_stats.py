"""The figures of a level, by hand and against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.bench import report, stats
from tokenloom.bench.stats import Objectives, Record, Run, Spread, cdf, level, percentile

ANY = Objectives()
finite = st.floats(0, 1e6, allow_nan=False)


def record(due, pieces, tokens=None, error=""):
    wanted = len(pieces) if tokens is None else tokens
    return Record(
        due_s=due,
        pieces_s=list(pieces),
        ended_s=(pieces[-1] if pieces else due) + 0.5,
        prompt_tokens=10,
        output_tokens=wanted,
        wanted_tokens=wanted,
        error=error,
    )


@given(st.lists(finite, min_size=1, max_size=60), st.floats(0, 1))
def test_percentiles_are_those_of_numpy(values, share):
    wanted = np.percentile(values, 100 * share)
    assert math.isclose(percentile(sorted(values), share), wanted, rel_tol=1e-9, abs_tol=1e-6)


def test_there_is_no_percentile_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    assert Spread.of([]) is None
    assert cdf([]) == []


@given(st.lists(finite, min_size=1, max_size=60))
def test_a_cdf_rises_from_the_least_value_to_the_greatest(values):
    points = cdf(values)
    assert len(points) == stats.CDF_POINTS
    assert points == sorted(points)
    assert points[0] == pytest.approx(min(values), abs=1e-4)
    assert points[-1] == pytest.approx(max(values), abs=1e-4)


def test_a_level_by_hand():
    # Two streams: first text after 1 s and 2 s, then a token each second; the second has two a piece.
    one = record(10.0, [11.0, 12.0, 13.0])
    two = record(10.0, [12.0, 14.0], tokens=4)
    found = level([one, two], Run(2, cpu_s=0.7), ANY)
    assert (found.completed, found.failed, found.total_input_tokens, found.total_output_tokens) == (
        2,
        0,
        20,
        7,
    )
    assert found.duration_s == 4.5  # from 10.0 to the last end, 14.5
    assert found.output_throughput == pytest.approx(7 / 4.5)
    assert found.request_throughput == pytest.approx(2 / 4.5)
    assert found.total_token_throughput == pytest.approx(27 / 4.5)
    assert (found.ttft_ms.mean, found.ttft_ms.p50, found.ttft_ms.max) == (1500, 1500, 2000)
    assert (found.itl_ms.mean, found.itl_ms.max) == (pytest.approx(4000 / 3), 2000)
    # TPOT divides by tokens, not by pieces: 2 s / 2 and 2 s / 3.
    assert found.tpot_ms.max == 1000
    assert found.tpot_ms.mean == pytest.approx((1000 + 2000 / 3) / 2)
    assert found.e2el_ms.max == 4500
    assert found.chunks_per_token == pytest.approx(5 / 7)
    assert found.client_cpu_us_per_token == pytest.approx(100_000)
    assert found.request_goodput is None


def test_failed_requests_count_against_goodput_and_nowhere_else():
    records = [record(0, [0.1, 0.2]), record(0, [0.9, 1.0]), record(0, [0.1], error="CUT_OFF")]
    found = level(records, Run(3), Objectives(ttft_ms=200))
    assert found.errors == {"CUT_OFF": 1}
    assert (found.completed, found.failed, found.good_share) == (2, 1, pytest.approx(1 / 3))
    assert found.request_goodput == pytest.approx(1 / 1.5)
    assert found.total_output_tokens == 4


def test_both_objectives_must_be_met():
    quick_then_slow = record(0, [0.1, 1.1])
    assert Objectives(ttft_ms=200).met(quick_then_slow)
    assert not Objectives(ttft_ms=200, itl_ms=500).met(quick_then_slow)
    assert not Objectives(ttft_ms=50, itl_ms=2000).met(quick_then_slow)
    assert not ANY


def test_a_level_where_everything_failed_has_no_times_and_no_division_by_zero():
    found = level([record(0, [], error="CONNECT")], Run(1), Objectives(ttft_ms=1))
    assert (found.ttft_ms, found.itl_ms, found.e2el_ms) == (None, None, None)
    assert (found.output_throughput, found.chunks_per_token, found.good_share) == (0, 0, 0)
    assert level([], Run(1), ANY).duration_s == 0


def test_answers_of_another_length_are_counted():
    short = record(0, [0.1, 0.2])
    short.wanted_tokens = 5
    assert level([short, record(0, [0.1])], Run(1), ANY).other_length == 1


def test_cold_and_warm_are_compared_by_their_medians():
    cold = [record(0, [1.0]), record(0, [2.0]), record(0, [9.0])]
    warm = [record(0, [0.2]), record(0, [0.4]), record(0, [0.5])]
    for found in warm:
        found.cached_prompt_tokens = 8
    prefix = report.compare(8, cold, warm)
    assert prefix.ratio == pytest.approx(0.2)
    assert (prefix.pairs, prefix.prompt_tokens, prefix.cached_tokens_mean) == (3, 10, 8)
    with pytest.raises(ValueError, match="CUT_OFF"):
        report.compare(8, cold, [record(0, [1.0], error="CUT_OFF")])
    with pytest.raises(ValueError, match="no comparison"):
        report.compare(8, [], [])


def test_a_report_reads_back_as_it_was_written_and_another_schema_is_refused():
    levels = [level([record(0, [0.5, 1.0])], Run(1, request_rate=2.0), ANY)]
    made = report.Report(
        kind="mesh", target="x", model="m", protocol="grpc", seed=1, started_unix_s=1.5, levels=levels
    )
    assert report.decode(report.encode(made)) == made
    with pytest.raises(ValueError, match="other/9"):
        report.decode(report.encode(made).replace(report.SCHEMA.encode(), b"other/9"))
