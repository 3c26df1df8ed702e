"""What prompts and decodes teach a pool about time."""

import random

import pytest

from services.batcher.core.pace import DECODE_S_UNKNOWN, LOOK_BACK_MAX, Pace

TOKEN_S = 2e-5
LOOK_BACK = 7.5e-5


def took_s(uncached, prompt):
    """The law that the fit is to find: every token takes longer for those before it."""
    return TOKEN_S * uncached * (1 + LOOK_BACK * (prompt - uncached / 2))


def taught(noise=0.0, prompts=400):
    pace, draw = Pace(), random.Random(3)
    for _ in range(prompts):
        prompt = draw.randrange(1_500, 60_000)
        uncached = draw.randrange(1_024, prompt)
        pace.prefilled(uncached, prompt, took_s(uncached, prompt) * (1 + noise * draw.uniform(-1, 1)))
    return pace


def test_nothing_is_known_before_the_first_prompt():
    pace = Pace()
    assert pace.prefill_s(10_000, 10_000) == 0.0
    assert pace.work(10_000, 10_000) == 10_000
    assert pace.decode_s == DECODE_S_UNKNOWN


def test_the_law_of_prompts_is_found():
    pace = taught()
    assert pace.token_s == pytest.approx(TOKEN_S, rel=1e-6)
    assert pace.look_back == pytest.approx(LOOK_BACK, rel=1e-6)
    assert pace.prefill_s(70_000, 75_000) == pytest.approx(took_s(70_000, 75_000), rel=1e-6)


def test_noise_moves_the_law_little():
    pace = taught(noise=0.3, prompts=2_000)
    assert pace.prefill_s(40_000, 40_000) == pytest.approx(took_s(40_000, 40_000), rel=0.15)


def test_short_prompts_teach_nothing():
    pace = Pace()
    for _ in range(10):
        pace.prefilled(1_023, 1_023, 1.0)
        pace.prefilled(5_000, 5_000, 0.0)
    assert pace.token_s == 0.0


def test_prompts_that_seem_quicker_the_longer_they_are_do_not_turn_the_law_round():
    pace = Pace()
    for prompt in (2_000, 20_000, 40_000) * 20:
        pace.prefilled(prompt, prompt, 1.0)
    assert pace.look_back == 0.0
    assert pace.token_s > 0


def test_a_law_without_a_base_stays_within_its_bounds():
    pace = Pace()
    for prompt in (2_000, 20_000, 40_000) * 20:
        pace.prefilled(prompt, prompt, 1e-9 * prompt * prompt)
    assert 0 < pace.look_back <= LOOK_BACK_MAX
    assert pace.token_s > 0


def test_work_is_counted_in_average_tokens():
    pace = taught()
    for _ in range(2_000):
        pace.sent(2_000, 2_000)
        pace.sent(50_000, 50_000)
    short, long = pace.work(2_000, 2_000), pace.work(50_000, 50_000)
    assert short < 2_000 < 50_000 < long
    assert short + long == pytest.approx(52_000, rel=0.02)


def test_what_is_cached_is_no_work_but_is_looked_back_at():
    pace = taught()
    assert pace.work(1_000, 1_000) < pace.work(1_000, 50_000) < pace.work(50_000, 50_000)


def test_decode_time_follows_the_requests():
    pace = Pace()
    for _ in range(500):
        pace.decoded(1.5)
    assert pace.decode_s == pytest.approx(1.5, rel=0.01)
