"""The law of a step's time, found again from steps that follow it."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.bench.calibrate_fit import (
    POINTS_MAX,
    Law,
    Work,
    errors,
    fit,
    loss,
    not_negative,
    relative,
)
from services.worker.bench.calibrate_grid import Grid, Point


def work(point):
    return Work(
        point.tokens,
        point.decodes * point.context,
        point.chunk * (point.before + point.chunk / 2),
        point.decodes + bool(point.chunk),
    )


WORKS = [work(point) for point in Grid().points()]
LAW = Law(
    fixed_s=4e-4, weights_s=5e-3, token_s=3.1e-5, kv_s=4.5e-8, pair_s=6e-10, sequence_s=2e-6
)  # an accelerator's


def test_a_step_by_hand():
    law = Law(fixed_s=1, weights_s=20, token_s=3, kv_s=0.5, pair_s=0.25, sequence_s=0.125)
    assert law.step_s(Work(tokens=4, kv_tokens=10, pairs=8, sequences=2)) == 1 + 20 + 5 + 2 + 0.25
    assert law.step_s(Work(tokens=10, kv_tokens=0, pairs=0, sequences=0)) == 1 + 30


terms = st.floats(1e-3, 1.0)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[terms] * 6), st.integers(-4, 4))
def test_a_law_that_steps_follow_is_found_again(shares, exponent):
    law = Law(*(share * value for share, value in zip(shares, astuple(LAW), strict=True)))
    took_s = [law.step_s(work) * 10**exponent for work in WORKS]
    found = fit(WORKS, took_s)
    assert errors(found, WORKS, took_s).largest < 1e-6
    # Where steps of both kinds are among the points, others are foretold too.
    if 33 < law.weights_s / law.token_s < 2000:
        for one in (Work(3000, 0, 1e6, 1), Work(1, 1e5, 0, 1)):
            assert found.step_s(one) == pytest.approx(law.step_s(one) * 10**exponent, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.8, 1.25), min_size=len(WORKS), max_size=len(WORKS)))
def test_noise_makes_no_term_negative_and_stays_about_as_small(noise):
    took_s = [LAW.step_s(work) * factor for work, factor in zip(WORKS, noise, strict=True)]
    found = fit(WORKS, took_s)
    assert min(astuple(found)) >= 0
    # The law that was there is one of those to choose from; the rounds of weighing stop a little short.
    assert loss(found, WORKS, took_s) <= loss(LAW, WORKS, took_s) * 1.02 + 1e-9


def test_a_step_that_was_held_up_does_not_bend_the_law():
    took_s = [LAW.step_s(work) for work in WORKS]
    took_s[3] *= 5
    found = fit(WORKS, took_s)
    missed = sorted(abs(error) for error in relative(found, WORKS, took_s))
    assert missed[-2] < 0.01
    assert missed[-1] == pytest.approx(0.8, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 12))
def test_the_terms_are_the_optimum_among_those_not_negative(seed, count, points):
    draw = np.random.default_rng(seed)
    columns = draw.normal(size=(points, count))
    wanted = draw.normal(size=points)
    found = not_negative(columns, wanted)
    assert found.min() >= 0
    # Karush, Kuhn and Tucker: no term could grow with gain, and those above 0 could not shrink with any.
    slope = columns.T @ (columns @ found - wanted)
    assert slope.min() > -1e-8
    assert abs(slope @ found) < 1e-8


def test_relative_errors_count_alike_for_short_and_long_steps():
    """One number for two kinds of steps that differ little: the mean, weighted by 1 / measured squared."""
    works = [Work(0, 0, 0, 0), Work(0, 0, 0, 0)]
    found = fit(works, [1.0, 1.04])
    assert found.step_s(works[0]) == pytest.approx((1 + 1 / 1.04) / (1 + 1 / 1.04**2))


def test_of_two_steps_that_differ_much_the_shorter_counts():
    """Error for error, no longer squared: one of 2 in 1 weighs more than one of 2 in 3."""
    works = [Work(0, 0, 0, 0), Work(0, 0, 0, 0)]
    found = fit(works, [1.0, 3.0])
    assert found.step_s(works[0]) == pytest.approx(1, rel=0.05)
    assert errors(found, works, [1.0, 3.0]).largest == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("works", "took_s"),
    [([], []), ([Work(1, 1, 1, 1)], [0.0]), ([Work(1, 1, 1, 1)], [float("nan")]),
     ([Work(1, 1, 1, 1)] * (POINTS_MAX + 1), [1.0] * (POINTS_MAX + 1))],
)  # fmt: skip
def test_points_that_cannot_be_fitted_are_refused(works, took_s):
    with pytest.raises(ValueError):
        fit(works, took_s)


def test_the_mean_of_several_steps():
    assert Work.mean([Work(1, 2, 3, 4), Work(3, 4, 5, 4)]) == Work(2, 3, 4, 4)
    with pytest.raises(ValueError, match="no step"):
        Work.mean([])


def test_points_know_what_they_compute():
    assert work(Point(16, 8192, 512, 0)) == Work(528, 16 * 8192, 512 * 256, 17)
