"""Clocks and absolute deadlines."""

import pytest

from tokenloom.kit.clock import FakeClock, SystemClock
from tokenloom.kit.deadlines import deadline_unix_ms, seconds_left


class CallWith:
    def __init__(self, left_s):
        self._left_s = left_s

    def deadline_s_left(self):
        return self._left_s


@pytest.mark.parametrize(("left_s", "expected_s"), [(None, 60), (5, 5), (600, 60)])
def test_deadline_is_the_callers_bounded_by_ours(left_s, expected_s):
    clock = FakeClock()
    deadline = deadline_unix_ms(CallWith(left_s), clock, 60)
    assert seconds_left(deadline, clock) == pytest.approx(expected_s)
    clock.advance(expected_s + 1)
    assert seconds_left(deadline, clock) == pytest.approx(-1)


def test_fake_clock_never_goes_back():
    with pytest.raises(ValueError, match="go back"):
        FakeClock().advance(-1)


def test_system_clock_units_agree():
    clock = SystemClock()
    assert abs(clock.unix_ns() / 1e6 - clock.unix_ms()) < 1000
