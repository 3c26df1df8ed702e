"""Measured speeds."""

import pytest

from services.worker.engine.rates import Rates


def test_nothing_measured_is_zero():
    assert (Rates().prefill_tokens_per_s, Rates().decode_tokens_per_s) == (0.0, 0.0)


def test_a_steady_speed_is_found_and_kept_while_idle():
    rates = Rates()
    for _ in range(50):
        rates.note(0, 32, 100_000_000)
    assert rates.decode_tokens_per_s == pytest.approx(320)
    assert rates.prefill_tokens_per_s == 0


def test_a_mixed_step_is_shared_by_tokens():
    rates = Rates()
    rates.note(90, 10, 1_000_000_000)
    assert rates.prefill_tokens_per_s == pytest.approx(100)
    assert rates.decode_tokens_per_s == pytest.approx(100)


def test_a_new_speed_wins_within_seconds():
    rates = Rates()
    rates.note(0, 1000, 10_000_000_000)
    for _ in range(160):
        rates.note(0, 50, 100_000_000)
    assert rates.decode_tokens_per_s == pytest.approx(500, rel=0.1)


def test_a_step_without_time_measures_nothing():
    rates = Rates()
    rates.note(5, 0, 0)
    assert rates.prefill_tokens_per_s == 0
