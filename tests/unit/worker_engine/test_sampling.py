"""What is drawn: against a slow oracle, and against transformers' own processors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.worker.core.sequence import Sequence
from services.worker.engine import sampling as module
from services.worker.engine.history import History, apply_history
from services.worker.engine.sampling import Batch, invert, sample
from services.worker.protocol import Sampling
from tests.unit.worker_engine.oracles import kept_tokens

CPU = torch.device("cpu")
VOCABULARY = 300


def history(parameters: Sampling, prompt=(1, 2, 3), output=(), **fields) -> History:
    one = Sequence("s", [*prompt, *output], len(prompt), 100, **fields)
    return History.of(one, parameters)


def random_logits(rows: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: torch.Tensor, histories) -> list[int]:
    return sample(logits.clone(), Batch(histories, CPU)).tokens


def draw_many(row: torch.Tensor, parameters: Sampling, count: int) -> list[int]:
    """The same logits for `count` seeds."""
    named = [history(_with(parameters, seed=seed)) for seed in range(count)]
    return draw(row.expand(count, -1), named)


def _with(parameters: Sampling, **changes) -> Sampling:
    fields = {name: getattr(parameters, name) for name in parameters.__struct_fields__}
    return Sampling(**(fields | changes))


def test_temperature_zero_takes_the_largest():
    logits = random_logits(4)
    assert draw(logits, [history(Sampling(temperature=0.0))] * 4) == logits.argmax(-1).tolist()


def test_greedy_and_drawn_rows_mix():
    logits = random_logits(3)
    cold, warm = history(Sampling(temperature=0.0)), history(Sampling(temperature=1.0, seed=9))
    alone = draw(logits[1:2], [warm])
    assert draw(logits, [cold, warm, cold]) == [int(logits[0].argmax()), *alone, int(logits[2].argmax())]


CASES = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7, top_k=5),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9, temperature=0.8, top_k=20),
    Sampling(min_p=0.1),
    Sampling(min_p=0.05, top_p=0.8, top_k=12),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
]


@pytest.mark.parametrize("parameters", CASES, ids=str)
def test_the_frequencies_are_the_oracles_probabilities(parameters):
    row = random_logits(1, seed=5)
    count = 4000
    wanted = kept_tokens(
        row[0].tolist(), parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p
    )
    found = draw_many(row, parameters, count)
    assert set(found) <= set(wanted)
    for token, probability in wanted.items():
        spread = math.sqrt(count * probability * (1 - probability))
        assert abs(found.count(token) - count * probability) <= 5 * spread + 3, token


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 7, 250, 300]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_the_tokens_kept_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(1, seed)
    kept = TemperatureLogitsWarper(temperature)(None, logits)
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        kept = warper(None, kept)
    parameters = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    batch = Batch([history(parameters)], CPU)
    scaled = (logits - logits.amax()) / temperature
    threshold = module._threshold(scaled, scaled.exp(), batch.cut)
    assert torch.equal(scaled >= threshold, kept > -math.inf)


def test_a_flat_distribution_is_cut_beyond_the_first_candidates(monkeypatch):
    monkeypatch.setattr(module, "CANDIDATES", 8)
    row = random_logits(1, seed=8, scale=0.01)
    wanted = kept_tokens(row[0].tolist(), 1.0, 0, 0.9, 0.0)
    assert len(wanted) > 200
    found = set(draw_many(row, Sampling(top_p=0.9), 3000))
    assert found <= set(wanted)
    assert len(found) > 200


def test_what_else_is_in_the_batch_changes_nothing():
    logits = random_logits(len(CASES))
    histories = [history(_with(case, seed=100 + n)) for n, case in enumerate(CASES)]
    together = draw(logits, histories)
    assert together == [draw(logits[n : n + 1], [histories[n]])[0] for n in range(len(CASES))]


def test_a_resumed_sequence_draws_the_same_number_at_the_same_position():
    row = random_logits(1)
    parameters = Sampling(seed=77)
    first = history(parameters, prompt=(1, 2, 3), output=(4, 5))
    resumed = history(parameters, prompt=(1, 2, 3, 4), output=(5,))
    assert draw(row, [first]) == draw(row, [resumed])
    later = [draw(row, [history(parameters, output=range(n))])[0] for n in range(20)]
    assert len(set(later)) > 5


def test_the_repetition_penalty_is_that_of_transformers():
    logits = random_logits(2)
    ids = torch.tensor([[5, 9, 9, 200], [7, 7, 7, 7]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    parameters = Sampling(repetition_penalty=1.7)
    found = logits.clone()
    apply_history(found, [history(parameters, row[:2], row[2:]) for row in ids.tolist()])
    assert torch.allclose(found, wanted, atol=1e-6)


def test_presence_and_frequency_count_the_output_alone():
    parameters = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.zeros(2, VOCABULARY)
    apply_history(logits, [history(parameters, (1, 1), (2, 3, 3)), history(Sampling())])
    assert logits[0, [1, 2, 3, 4]].tolist() == [0.0, -0.75, -1.0, 0.0]
    assert not logits[1].any()


def test_penalties_follow_what_is_drawn():
    one = history(Sampling(temperature=0.0, presence_penalty=100.0))
    batch = Batch([one], CPU)
    row = random_logits(1)
    drawn = []
    for _ in range(3):
        drawn += sample(row.clone(), batch).tokens
        one.sequence.tokens.append(drawn[-1])
    assert drawn == row[0].topk(3).indices.tolist()


def test_a_history_longer_than_its_first_buffer_is_kept():
    parameters = Sampling(repetition_penalty=2.0)
    logits = torch.ones(1, 2000)
    apply_history(logits, [history(parameters, range(700), range(700, 1500))])
    assert (logits[0, :1500] == 0.5).all()
    assert (logits[0, 1500:] == 1.0).all()


def test_bias_is_added_and_can_forbid():
    logits = torch.zeros(2, VOCABULARY)
    biased = history(Sampling(temperature=0.0, logit_bias={7: 5.0, 8: -100.0}))
    found = logits.clone()
    apply_history(found, [history(Sampling()), biased])
    assert found[1, [7, 8]].tolist() == [5.0, -100.0]
    assert not found[0].any()
    assert draw(logits, [biased, biased]) == [7, 7]


@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_stop_tokens_are_forbidden_before_the_minimum_as_in_transformers(drawn):
    logits = random_logits(1)
    output = list(range(20, 20 + drawn))
    one = history(Sampling(), output=output, min_new_tokens=2, stop_token_ids=frozenset({5, 6}))
    wanted = MinNewTokensLengthLogitsProcessor(3, 2, torch.tensor([5, 6]))(
        torch.tensor([[1, 2, 3, *output]]), logits.clone()
    )
    found = logits.clone()
    apply_history(found, [one])
    assert torch.equal(found, wanted)


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(3)
    histories = [
        history(Sampling(temperature=0.3, seed=1, logprobs=2, logit_bias={4: 3.0})),
        history(Sampling(temperature=0.0)),
        history(Sampling(temperature=0.0, logprobs=0)),
    ]
    drawn = sample(logits.clone(), Batch(histories, CPU))
    wanted = logits.log_softmax(-1)
    first, none, last = drawn.logprobs
    assert none is None
    assert first.chosen == pytest.approx(wanted[0, drawn.tokens[0]].item(), abs=1e-5)
    assert first.top_ids == wanted[0].topk(2).indices.tolist()
    assert first.top == pytest.approx(wanted[0].topk(2).values.tolist(), abs=1e-5)
    assert (last.top_ids, last.top) == ([], [])
    assert last.chosen == pytest.approx(wanted[2].max().item(), abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.001, 0.5, 1.0]), min_size=1, max_size=700),
    st.floats(min_value=2.0**-53, max_value=1 - 2.0**-53),
)
def test_inverting_finds_the_token_whose_share_holds_the_point(weights, point):
    if not any(weights):
        weights[-1] = 1.0
    row = torch.tensor([weights])
    found = int(invert(row, torch.tensor([point], dtype=torch.float64))[0])
    exact = row[0].double()
    ends = exact.cumsum(0)
    assert weights[found] > 0
    slack = 1e-6 * float(ends[-1])
    assert float(ends[found]) >= point * float(ends[-1]) - slack
    assert float(ends[found] - exact[found]) <= point * float(ends[-1]) + slack


def test_logits_that_are_no_numbers_still_give_a_token():
    logits = torch.full((2, VOCABULARY), math.nan)
    for token in draw(logits, [history(Sampling()), history(Sampling(temperature=0.0))]):
        assert 0 <= token < VOCABULARY


def test_half_precision_logits_are_drawn_in_float32():
    logits = random_logits(1).bfloat16()
    assert draw(logits, [history(Sampling(seed=3))]) == draw(logits.float(), [history(Sampling(seed=3))])
