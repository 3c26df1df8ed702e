"""The step-time law, its profiles, and a trace's way into virtual time."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batcher.simulate import law
from services.batcher.simulate.trace import TIMESTAMP_STEP_S, Recorded, at_rate, recorded
from tests.unit.batcher_simulate.made import H100, small
from tokenloom.bench.traces import Entry


def test_a_step_is_bound_by_weights_and_then_by_arithmetic():
    few, more = H100.step_s(1, 0, 0, 0), H100.step_s(100, 0, 0, 0)
    assert few == more == H100.fixed_s + H100.weights_s
    assert H100.step_s(2000, 0, 0, 0) == pytest.approx(H100.fixed_s + 2000 * H100.token_s)


def test_every_term_of_the_law_counts():
    base = H100.step_s(1, 0, 0, 0)
    assert H100.step_s(1, 1000, 0, 0) - base == pytest.approx(1000 * H100.kv_s)
    assert H100.step_s(1, 0, 1000, 0) - base == pytest.approx(1000 * H100.pair_s)
    assert H100.step_s(1, 0, 0, 10) - base == pytest.approx(10 * H100.sequence_s)


@given(st.integers(1, 50_000))
def test_a_cold_prompt_takes_the_sum_of_its_chunks(tokens):
    total, before = 0.0, 0
    while before < tokens:
        count = min(H100.step_tokens_max, tokens - before)
        total += H100.step_s(count, 0, law.chunk_pairs(before, count), 1)
        before += count
    assert H100.cold_prefill_s(tokens) == pytest.approx(total, rel=1e-9)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 3_000), min_size=1, max_size=5))
def test_pairs_do_not_depend_on_how_a_prompt_is_cut(before, counts):
    cut = sum(law.chunk_pairs(before + sum(counts[:place]), count) for place, count in enumerate(counts))
    assert cut == pytest.approx(law.chunk_pairs(before, sum(counts)))


def test_a_profile_is_found_by_name_and_by_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(small()))
    assert law.load("h100-8b").name == "h100-8b"
    assert law.load(str(path)) == small()


def test_every_constant_of_a_profile_says_where_it_comes_from():
    measured = {"weights_s", "token_s", "kv_s", "pair_s", "fixed_s", "sequence_s", "kv_tokens"}
    for path in law.PROFILES.glob("*.json"):
        assert measured <= set(law.load(path.stem).source)


@pytest.mark.parametrize(
    "change", [{"kv_s": -1.0}, {"sequences_max": 4096}, {"kv_tokens": 3}, {"token_s": "fast"}, {"what": 1}]
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path, change):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(msgspec.to_builtins(H100) | change))
    with pytest.raises(law.ProfileError, match=r"bad\.json"):
        law.load(str(path))


def test_an_unknown_profile_is_answered_with_those_there_are():
    with pytest.raises(law.ProfileError, match="there are: h100-8b"):
        law.load("h900")


def entry(timestamp=0, tokens=1500, ids=(1, 2, 3), output=10):
    return Entry(timestamp, tokens, output, list(ids))


def test_only_whole_blocks_have_a_number_and_it_names_all_before_it():
    one, other, third = recorded([entry(), entry(ids=(1, 2, 9)), entry(tokens=1536, ids=(7, 2, 3))])
    assert one.prefix == other.prefix
    assert len(one.prefix) == 2
    assert len(third.prefix) == 3
    assert not set(third.prefix) & set(one.prefix)


def test_an_answer_has_one_token_at_least():
    assert recorded([entry(output=0)])[0].output_tokens == 1


rates = st.floats(0.3, 20)
timestamps = st.lists(st.integers(0, 20), min_size=1, max_size=60).map(sorted)


@given(timestamps, rates, st.integers(0, 3))
def test_requests_are_spread_evenly_inside_their_three_seconds(steps, rate, seed):
    trace = [Recorded(step * TIMESTAMP_STEP_S, 10, 1, ()) for step in steps]
    arrivals = at_rate(trace, rate, seed)
    assert [each.at for each in arrivals] == sorted(each.at for each in arrivals)
    for step in set(steps):
        begin, width = step * TIMESTAMP_STEP_S / rate, TIMESTAMP_STEP_S / rate
        inside = [each.at for each in arrivals if begin <= each.at < begin + width]
        count = steps.count(step)
        assert [int((at - begin) / width * count + 1e-6) for at in inside] == pytest.approx(
            list(range(count)), abs=1
        )
        assert len(inside) == count


def test_a_seed_gives_the_same_arrivals_and_another_others():
    trace = [Recorded(0.0, 10, 1, ())] * 5
    assert at_rate(trace, 2.0, 0) == at_rate(trace, 2.0, 0) != at_rate(trace, 2.0, 1)


def test_no_rate_is_an_error():
    with pytest.raises(ValueError, match="positive"):
        at_rate([], 0.0, 0)
