"""Prompt tokens beside decodes: the allowance finds the bound, and never stops a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.chunking import TOKENS_FLOOR, Chunking

MS = 1_000_000


@given(
    base_ms=st.floats(1, 40),
    token_us=st.floats(1, 400),
    bound_ms=st.floats(50, 400),
    most=st.integers(64, 16384),
)
def test_steps_come_to_stay_within_the_bound_and_use_it(base_ms, token_us, bound_ms, most):
    chunking = Chunking(most, int(bound_ms * MS))
    for _ in range(60):
        tokens = chunking.budget(most, 4)
        step_ms = base_ms + tokens * token_us / 1000
        chunking.note(tokens, 4, int(step_ms * MS))
    tokens = chunking.budget(most, 4)
    step_ms = base_ms + tokens * token_us / 1000
    assert step_ms <= bound_ms * 1.05 or tokens <= TOKENS_FLOOR
    ideal = (bound_ms - base_ms) * 1000 / token_us
    assert tokens >= min(most, 0.7 * ideal) or tokens >= min(most, TOKENS_FLOOR) >= 0.7 * ideal


def test_without_decodes_or_without_a_bound_a_step_is_filled():
    bounded = Chunking(4096, 10 * MS)
    bounded.note(4096, 8, 100 * MS)
    assert bounded.budget(4000, 0) == 4000
    assert bounded.budget(4000, 1) < 500
    free = Chunking(4096)
    free.note(4096, 8, 100 * MS)
    assert free.budget(4000, 1) == 4000


def test_small_steps_say_nothing_about_large_ones():
    chunking = Chunking(4096, 50 * MS)
    chunking.note(4096, 8, 100 * MS)
    before = chunking.tokens
    chunking.note(20, 8, 10 * MS)
    chunking.note(before, 0, 500 * MS)
    assert chunking.tokens == before


def test_however_long_steps_take_prompts_go_on():
    chunking = Chunking(4096, MS)
    for _ in range(50):
        chunking.note(chunking.tokens, 8, 1000 * MS)
    assert chunking.budget(4000, 8) == TOKENS_FLOOR
