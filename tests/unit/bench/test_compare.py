"""Medians over rounds, ratios, and whose turn it is."""

from collections import Counter

import pytest

from tokenloom.bench import compare
from tokenloom.bench.compare import Cell
from tokenloom.bench.stats import Objectives, Record, Run, level


def cell(system, number, concurrency, tokens_per_s, ttft_s=0.5):
    """A level of one answer that takes ten seconds."""
    record = Record(0.0, [ttft_s, 9.0], 10.0, 5, 0, int(tokens_per_s * 10))
    return Cell(system=system, round=number, level=level([record], Run(concurrency), Objectives()))


def test_the_median_of_the_rounds_counts_and_its_range_is_kept():
    cells = [cell("ours", number, 8, rate) for number, rate in enumerate((10, 50, 20))]
    (median,) = compare.medians(cells)
    assert (median.output_throughput, median.output_throughput_least, median.output_throughput_most) == (
        pytest.approx(20),
        pytest.approx(10),
        pytest.approx(50),
    )
    assert (median.rounds, median.concurrency, median.ttft_ms_p50) == (3, 8, 500)
    (middle,) = compare.median_levels(cells, "ours")
    assert middle.output_throughput == pytest.approx(20)


def test_ratios_are_ours_to_theirs_at_the_same_load():
    cells = [cell("ours", 0, 1, 30, 0.2), cell("peer", 0, 1, 20, 0.4), cell("peer", 0, 8, 90)]
    (ratio,) = compare.ratios(compare.medians(cells), "ours")
    assert (ratio.peer, ratio.concurrency) == ("peer", 1)
    assert ratio.output_throughput == pytest.approx(1.5)
    assert ratio.ttft_p50 == pytest.approx(0.5)


def test_a_peer_that_gave_nothing_has_no_ratio():
    failed = level([Record(error="CONNECT")], Run(1), Objectives())
    cells = [cell("ours", 0, 1, 30), Cell(system="peer", round=0, level=failed)]
    medians = compare.medians(cells)
    assert compare.ratios(medians, "ours") == []
    assert medians[1].ttft_ms_p50 is None
    assert medians[1].failed == 1


def test_systems_take_turns_within_each_load_and_none_is_always_first():
    turns = list(compare.turns(["a", "b"], [1, 8], 2))
    assert turns == [
        (0, 1, "a"), (0, 1, "b"), (0, 8, "a"), (0, 8, "b"),
        (1, 1, "b"), (1, 1, "a"), (1, 8, "b"), (1, 8, "a"),
    ]  # fmt: skip
    counts = Counter((load, name) for _, load, name in compare.turns("abc", [1, 2], 4))
    assert set(counts.values()) == {4}
