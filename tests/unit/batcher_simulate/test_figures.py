"""What is counted, what no policy exceeds, and how the highest rate is found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batcher.simulate.bound import Bound
from services.batcher.simulate.metrics import (
    OutOfReach,
    Percentiles,
    Slo,
    in_reach,
    jain,
    percentiles,
    summarise,
)
from services.batcher.simulate.record import Record, Sample, WorkerTotals
from services.batcher.simulate.search import RATE_MAX, RATE_MIN, RATE_STEP, RateSearch
from tests.unit.batcher_simulate.made import H100, SLO, arrival


def recorded(times):
    """One request each: (time to first token, time to the end); None never ended."""
    record = Record(len(times))
    for number, time in enumerate(times):
        if time is not None:
            record.sent(number, 0, 10.0 * number)
            record.first_token(number, 0, 10.0 * number + time[0])
            record.ended(number, 0, 10.0 * number + time[1])
    record.workers = {0: WorkerTotals(4.0, 1000, 250, 750, 40), 1: WorkerTotals(0.0, 0, 0, 0, 0)}
    record.samples = [Sample(float(at), at, 0, 1) for at in range(1500)]
    return record


def summary(times, **of):
    made = [
        arrival(10.0 * number, of.get("prompt", 100), of.get("output", 11)) for number in range(len(times))
    ]
    return summarise("one", 1.0, made, recorded(times), H100, SLO, 0.5)


def test_good_is_in_time_for_the_first_token_and_for_all_others():
    result = summary([(2.0, 2.25), (2.01, 2.1), (1.0, 1.26), None])
    assert result.good == 1
    assert result.good_share == 0.25
    assert (result.ttft_ok_share, result.itl_ok_share) == (0.5, 0.5)
    assert result.unfinished == 1
    assert result.goodput == pytest.approx(1 / 30)


def test_an_answer_of_one_token_has_nothing_between_its_tokens():
    assert summary([(1.0, 1.0)], output=1).good == 1


def test_a_prompt_that_is_too_long_for_every_policy_is_left_out():
    result = summary([(1.0, 1.1), (1.0, 1.1)], prompt=60_000)
    assert (result.requests, result.good, result.good_share, result.ttft_ms.p50) == (2, 0, 0.0, 0.0)
    assert result.out_of_reach == OutOfReach(2, 2, Percentiles(1000.0, 1000.0, 1000.0))
    edge = next(n for n in range(30_000, 60_000) if H100.cold_prefill_s(n) > SLO.ttft_s)
    assert in_reach([arrival(0.0, edge - 1), arrival(0.0, edge)], H100, SLO) == [0]


def test_totals_of_workers_become_hit_rate_and_balance():
    result = summary([(1.0, 1.1), (1.0, 1.1)])
    assert result.hit_rate == 0.25
    assert result.jain_load == 0.5
    assert result.busy_share == pytest.approx(0.2)


def test_a_long_series_is_thinned():
    series = summary([(1.0, 1.1)]).series
    assert len(series.at_s) == 500
    assert series.held[:3] == [0, 3, 6]


def test_percentiles_are_ranks():
    assert percentiles([value / 1000 for value in range(100)]) == Percentiles(50.0, 90.0, 99.0)
    assert percentiles([]).p99 == 0.0


def test_jain_is_one_when_even_and_one_nth_when_one_has_all():
    assert jain([3.0, 3.0]) == 1.0
    assert jain([3.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert jain([0.0]) == 1.0


def bound(made, workers=1, slo=SLO):
    return Bound(made, H100, workers, slo)


def test_the_bound_is_all_when_there_is_time():
    made = [arrival(float(at), 1000, 100) for at in range(10)]
    assert bound(made).good_max() == 10


def test_a_burst_that_nobody_can_prefill_in_time_costs_requests():
    made = [arrival(at / 1000, 20_000, 1) for at in range(8)]
    alone = H100.cold_prefill_s(20_000)
    possible = int(SLO.ttft_s / alone) + 1
    assert possible < 8
    assert 2 <= bound(made).good_max() <= possible
    assert bound(made, workers=8).good_max() == 8


def test_a_shared_prefix_is_paid_once_in_all():
    shared = [arrival(at / 1000, 20_480, 1, list(range(40))) for at in range(30)]
    assert bound(shared).good_max() == 30
    own = [arrival(at / 1000, 20_480, 1) for at in range(30)]
    assert bound(own).good_max() < 5


def test_answers_count_too():
    long = [arrival(at / 1000, 12_000, 1000, list(range(23))) for at in range(60)]
    short = [each._replace(output_tokens=1) for each in long]
    assert bound(short).good_max() == 60
    assert bound(long).good_max() < 60


def test_requests_out_of_reach_do_not_count():
    made = [arrival(0.0, 60_000, 1), arrival(0.0, 100, 1)]
    assert (bound(made).good_max(), bound(made).good_share()) == (1, 1.0)
    assert bound(made[:1]).good_share() == 1.0


@given(st.floats(RATE_MIN, RATE_MAX), st.integers(1, 3), st.lists(st.floats(RATE_MIN, RATE_MAX), max_size=3))
def test_the_search_finds_the_highest_good_rate(edge, together, first):
    search, runs = RateSearch(0.9), 0
    for rate in first:
        search.note(rate, 1.0 if rate <= edge else 0.0)
    while rates := search.next_rates(together):
        runs += 1
        assert len(rates) <= together
        for rate in rates:
            search.note(rate, 0.95 if rate <= edge else 0.5)
    assert edge - 2 * RATE_STEP - 1e-3 <= search.best <= edge + 1e-3
    assert runs < 25


def test_a_policy_that_is_never_good_has_no_rate():
    search = RateSearch(0.9)
    while rates := search.next_rates(1):
        search.note(rates[0], 0.1)
    assert search.best == 0.0


def test_a_rate_above_one_that_failed_does_not_count():
    search = RateSearch(0.9)
    for rate, share in ((2.0, 0.95), (3.0, 0.8), (4.0, 0.91)):
        search.note(rate, share)
    assert search.best == 2.0
    assert all(2.0 < rate < 3.0 for rate in search.next_rates(3))


def test_a_good_rate_above_one_that_fails_later_is_forgotten():
    search = RateSearch(0.9)
    search.note(3.0, 0.95)
    search.note(2.0, 0.5)
    assert search.best == 0.0
    assert max(search.next_rates(2)) < 2.0


def test_slo_is_of_the_caller():
    made = [arrival(0.0, 1000, 10)]
    assert in_reach(made, H100, Slo(0.001, 1.0)) == []
