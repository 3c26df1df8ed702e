"""A step that ran out of memory is tried smaller, and sizes come back slowly."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.pressure import STEPS_CALM, TOKENS_FLOOR, Pressure


def test_tokens_are_halved_first_then_sequences_then_the_last_one_goes_token_by_token():
    pressure = Pressure(512, 8)
    seen = []
    tokens, sequences = 200, 3
    while pressure.rise(tokens, sequences):
        seen.append((pressure.tokens, pressure.sequences))
        tokens, sequences = min(tokens, pressure.tokens), min(sequences, pressure.sequences)
    assert seen == [(100, 8), (50, 8), (25, 8), (16, 8), (16, 1), (8, 1), (4, 1), (2, 1), (1, 1)]


def test_what_is_calm_for_long_grows_to_the_whole_again():
    pressure = Pressure(100, 8)
    assert pressure.rise(TOKENS_FLOOR, 8)
    sizes = []
    for _ in range(4 * STEPS_CALM):
        pressure.ease()
        sizes.append((pressure.tokens, pressure.sequences))
    assert sizes[STEPS_CALM - 2] == (16, 4)
    assert sizes[STEPS_CALM - 1 :: STEPS_CALM] == [(32, 8), (64, 8), (100, 8), (100, 8)]


def test_trouble_begins_the_wait_anew():
    pressure = Pressure(100, 8)
    pressure.rise(100, 8)
    for _ in range(STEPS_CALM - 1):
        pressure.ease()
    pressure.rise(50, 8)
    pressure.ease()
    assert pressure.tokens == 25


@given(st.integers(1, 600), st.integers(1, 70))
def test_every_answer_allows_less_until_nothing_is_left(tokens, sequences):
    pressure = Pressure(600, 70)
    for _ in range(100):
        sequences = min(sequences, tokens)
        if not pressure.rise(tokens, sequences):
            assert (tokens, sequences) == (1, 1)
            return
        smaller = min(tokens, pressure.tokens), min(sequences, pressure.sequences)
        assert smaller < (tokens, sequences)
        tokens, sequences = smaller
    raise AssertionError("it never gives up")
