"""Prompts, traces and arrival times: the right lengths, shared exactly where they should be."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.bench import prompts, schedule, traces, workload
from tokenloom.bench.prompts import Calibration, Item, Part
from tokenloom.bench.traces import Fit, TraceError
from tokenloom.bench.workload import Lengths

PLAIN = Calibration()


def line(at_ms, given, drawn, *hash_ids):
    fields = {"timestamp": at_ms, "input_length": given, "output_length": drawn, "hash_ids": hash_ids}
    return json.dumps(fields).encode()


def common(a, b):
    """Words at the beginning that two texts share."""
    pairs = zip(a.split(), b.split(), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_arrivals_begin_at_once_rise_and_have_the_asked_rate():
    times = schedule.poisson(5.0, 20_000, random.Random(1))
    assert times[0] == 0
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.03)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    # Exponential gaps: as much spread as mean.
    assert sum((gap - 0.2) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.04, rel=0.1)


def test_the_same_seed_gives_the_same_arrivals():
    once, again = (schedule.poisson(2, 50, random.Random(7)) for _ in range(2))
    assert once == again
    assert once != schedule.poisson(2, 50, random.Random(8))
    assert schedule.poisson(2, 0, random.Random(7)) == []


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        schedule.poisson(rate, 3, random.Random(1))


def test_words_are_different_and_plain():
    assert len(prompts.WORDS) == len(set(prompts.WORDS)) > 100
    assert all(word.isalpha() and word.islower() for word in prompts.WORDS)


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_a_text_has_as_many_words_as_asked(tokens, seed):
    item = Item((Part("a", tokens),), 1)
    assert len(prompts.text(item, seed, PLAIN).split()) == tokens


@given(
    st.integers(0, 60),
    st.sampled_from([1.0, 1.5, 2.0, 4.0]),
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
)
def test_with_its_calibration_a_prompt_comes_to_the_asked_tokens(overhead, per_word, sizes):
    def count(text):
        return overhead + per_word * len(text.split())

    probes = tuple(count(prompts.probe_text(words, 3)) for words in prompts.PROBE_WORDS)
    calibration = Calibration.fit(probes)
    item = Item(tuple(Part(f"p{number}", size) for number, size in enumerate(sizes)), 1)
    if item.prompt_tokens < calibration.least_tokens():
        return
    # Each part is a whole number of words.
    slack = per_word * (len(sizes) + 1) / 2 if per_word > 1 else 0
    assert abs(count(prompts.text(item, 3, calibration)) - item.prompt_tokens) <= slack


def test_a_usage_that_does_not_grow_with_the_prompt_is_no_calibration():
    with pytest.raises(ValueError, match="came to"):
        Calibration.fit((10, 10))


def test_fixed_requests_share_no_prefix_with_each_other_or_with_another_seed():
    items = workload.fixed("request", 40, Lengths(32, 5))
    texts = [prompts.text(item, seed, PLAIN) for item in items for seed in (1, 2)]
    longest = max(common(a, b) for a, b in itertools.combinations(texts, 2))
    assert longest < 8  # half a block of a usual prefix cache
    assert {(item.prompt_tokens, item.output_tokens) for item in items} == {(32, 5)}
    assert prompts.text(items[0], 1, PLAIN) == prompts.text(items[0], 1, PLAIN)


def test_token_ids_have_the_length_and_stay_inside_the_vocabulary():
    for vocab in (50, 211, 49_152):
        ids = prompts.token_ids(Item((Part("a", 500), Part("b", 13)), 1), 1, vocab)
        assert len(ids) == 513
        assert all(0 <= token < vocab for token in ids)
    assert min(ids) >= prompts.SPECIAL_IDS_MAX


def test_a_pair_shares_its_prefix_and_nothing_after_it():
    pairs = workload.pairs("pair", 3, 100, Lengths(20, 4))
    for cold, warm in pairs:
        a, b = (prompts.token_ids(item, 1, 49_152) for item in (cold, warm))
        assert a[:100] == b[:100]
        assert a[100] != b[100]
        assert len(a) == len(b) == 120
    beginnings = {tuple(prompts.token_ids(cold, 1, 49_152)[:16]) for cold, _ in pairs}
    assert len(beginnings) == 3


def test_equal_hash_ids_give_equal_blocks_and_others_do_not():
    lines = [line(0, 1100, 9, 1, 2, 3), line(500, 1300, 9, 1, 2, 4), line(900, 700, 1, 5, 2)]
    first, second, third = traces.items(traces.read(lines, 10), Fit())
    texts = [prompts.text(item, 1, PLAIN) for item in (first, second, third)]
    assert [len(text.split()) for text in texts] == [1100, 1300, 700]
    assert 1024 <= common(texts[0], texts[1]) < 1030
    # A block's words do not depend on what comes before it, whole prompts do.
    assert common(texts[0], texts[2]) < 8
    assert texts[0].split()[512:700] == texts[2].split()[512:700]


def test_a_trace_is_scaled_and_cut():
    entries = traces.read([line(1000, 1000, 100, 1, 2), line(3000, 100, 10)], 10)
    fit = Fit(rate_scale=2, length_scale=0.5, input_max=300, output_max=40)
    first, second = traces.items(entries, fit)
    # The first comes at once, the gap of 2 s is halved.
    assert (first.at_s, second.at_s) == (0, 1)
    assert [part.tokens for part in first.parts] == [256, 44]
    assert (first.output_tokens, second.prompt_tokens, second.output_tokens) == (40, 50, 5)
    assert traces.cut(entries, fit) == 1
    assert traces.cut(entries, Fit()) == 0


def test_a_trace_out_of_order_is_put_in_order():
    entries = traces.read([line(2000, 5, 5), line(1000, 6, 6)], 10)
    assert [item.prompt_tokens for item in traces.items(entries, Fit())] == [6, 5]


def test_only_so_many_lines_of_a_trace_are_read_and_empty_ones_are_passed_over():
    lines = itertools.chain([b"\n"], itertools.repeat(line(0, 5, 5)))
    assert len(traces.read(lines, 3)) == 3


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([line(0, 5, 5), b"{"], "line 2"),
        ([line(0, 0, 5)], "line 1.*input_length"),
        ([line(0, 5, -1)], "line 1.*output_length"),
        ([b'{"timestamp": 1}'], "line 1.*input_length"),
        ([], "no request"),
    ],
)
def test_a_wrong_line_is_named(lines, what):
    with pytest.raises(TraceError, match=what):
        traces.read(lines, 10)
