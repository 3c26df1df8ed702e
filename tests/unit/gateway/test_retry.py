"""Which failures are tried again, when, and how often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.journal import Journal
from services.gateway.core.retry import RESENT_REASONS, Failure, RetryPolicy, is_break

POLICY = RetryPolicy(attempts_max=10, breaks_max=2, backoff_initial_s=0.02, backoff_max_s=2.0)


def journal(attempts=1, tokens=0, breaks=0):
    made = Journal()
    made.attempts = made.fruitless = attempts
    made.tokens = list(range(tokens))
    made.breaks = breaks
    made.broken = breaks > 0
    return made


def delay(reason, of, *, retriable=True, hint=None, left=60.0, jitter=0.5, began=False):
    failure = Failure(reason, retriable, hint, began)
    return POLICY.delay_s(failure, of, seconds_left=left, jitter=jitter)


@pytest.mark.parametrize("reason", sorted(RESENT_REASONS))
def test_a_refusal_that_cost_nothing_is_sent_again(reason):
    assert delay(reason, journal()) is not None


@pytest.mark.parametrize(
    "reason", ["QUEUE_FULL", "SHED", "NO_CAPACITY", "TENANT_OVER_SHARE", "MODEL_MEMORY_BUSY"]
)
def test_a_policys_answer_goes_to_the_caller(reason):
    assert delay(reason, journal()) is None


@pytest.mark.parametrize("reason", ["QUEUE_FULL", "NO_CAPACITY", "MODEL_MEMORY_BUSY"])
def test_once_a_worker_had_begun_the_rest_is_owed_whatever_the_policy_says(reason):
    assert delay(reason, journal(breaks=1)) is not None


def test_what_cannot_succeed_later_is_not_sent_again():
    assert delay("FIELD_INVALID", journal(breaks=1), retriable=False) is None


def test_attempts_are_bounded():
    assert delay("WORKER_FULL", journal(attempts=9)) is not None
    assert delay("WORKER_FULL", journal(attempts=10)) is None


def test_a_request_that_kills_engines_does_not_kill_many():
    assert delay("ENGINE_RESTARTED", journal(breaks=2)) is not None
    assert delay("ENGINE_RESTARTED", journal(breaks=3)) is None


def test_a_model_that_no_worker_holds_is_not_looked_for_until_the_deadline():
    patient = RetryPolicy(attempts_max=1000, breaks_max=2, backoff_initial_s=0.02, backoff_max_s=2.0)
    failure = Failure("MODEL_NOT_READY", True)
    tries = [
        n for n in range(1, 100)
        if patient.delay_s(failure, journal(attempts=n), seconds_left=60, jitter=0.5) is not None
    ]  # fmt: skip
    assert tries == list(range(1, 16))


def test_a_batcher_that_waited_for_the_model_already_is_not_asked_again_for_the_caller():
    assert delay("MODEL_NOT_READY", journal(), hint=2.0) is None
    assert delay("MODEL_NOT_READY", journal(breaks=1), hint=2.0) is not None


def test_waiting_grows_and_is_bounded():
    waits = [delay("WORKER_FULL", journal(attempts=n), jitter=0.999) for n in range(1, 10)]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.02, rel=0.01)
    assert waits[-1] == pytest.approx(2.0, rel=0.01)


def test_a_hint_is_obeyed_and_spread():
    assert delay("WORKER_FULL", journal(), hint=3.0, jitter=0.0) == 3.0
    assert 3.0 < delay("WORKER_FULL", journal(), hint=3.0, jitter=0.9) < 3.75


def test_a_wait_beyond_the_deadline_is_not_begun():
    assert delay("WORKER_FULL", journal(), hint=3.0, left=2.9) is None


@given(st.integers(1, 9), st.floats(0, 0.999), st.floats(0.001, 10))
def test_the_wait_is_never_longer_than_the_bound_nor_than_the_time_left(attempts, jitter, left):
    wait = delay("WORKER_FULL", journal(attempts=attempts), jitter=jitter, left=left)
    assert wait is None or 0 < wait <= min(2.0, left)


def test_a_stream_that_had_begun_is_a_break_and_a_refusal_is_none():
    assert is_break(Failure("SERVICE_UNAVAILABLE", True, None, began=True))
    assert is_break(Failure("ENGINE_RESTARTED", True))
    assert not is_break(Failure("WORKER_FULL", True))
