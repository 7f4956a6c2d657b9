"""Closed forms of the intervals."""

import math

import pytest

from diffusion_moe.study.intervals import Interval, all_of, interval, paired_difference, t_quantile

P = 0.975


def test_quantiles_of_one_and_two_degrees_are_closed_forms():
    """Student's t with 1 degree is a Cauchy distribution; with 2 its distribution function is algebraic."""
    assert t_quantile(P, 1) == pytest.approx(math.tan(math.pi * (P - 0.5)), rel=1e-9)
    assert t_quantile(P, 2) == pytest.approx((2 * P - 1) / math.sqrt(2 * P * (1 - P)), rel=1e-9)
    assert t_quantile(P, 10**7) == pytest.approx(1.959964, abs=1e-5)


def test_an_interval_is_the_mean_and_t_standard_errors():
    """1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3)."""
    half = (2 * P - 1) / math.sqrt(2 * P * (1 - P)) / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half, 3))
    assert interval([4.0]) == Interval(4.0, -math.inf, math.inf, 1)


def test_pairs_cancel_what_seeds_share():
    """The values differ by 10 between the seeds, and by exactly 0.1 within each."""
    difference = paired_difference([1.0, 11.0, 21.0], [1.1, 11.1, 21.1])
    assert difference == pytest.approx((-0.1, -0.1, -0.1, 3))
    assert difference.verdict == "holds"
    assert paired_difference([1.1, 11.1], [1.0, 11.0]).verdict == "does not hold"


def test_a_margin_is_a_share_of_the_worse_value():
    assert paired_difference([1.005, 2.01], [1.0, 2.0], margin=0.01).mean == pytest.approx(-0.0075)
    assert paired_difference([1.005, 2.01], [1.0, 2.0], margin=0.01).high > 0


@pytest.mark.parametrize(
    ("bounds", "verdict"), [((-2, -1), "holds"), ((1, 2), "does not hold"), ((-1, 1), "cannot be told")]
)
def test_the_verdict_is_told_only_where_the_interval_excludes_zero(bounds, verdict):
    assert Interval(sum(bounds) / 2, *bounds, 3).verdict == verdict


def test_one_seed_tells_nothing():
    assert paired_difference([1.0], [2.0]).verdict == "cannot be told"


def test_a_claim_of_several_pairs_holds_if_all_do():
    assert all_of(["holds", "holds"]) == "holds"
    assert all_of(["holds", "cannot be told"]) == "cannot be told"
    assert all_of(["holds", "cannot be told", "does not hold"]) == "does not hold"
    assert all_of([]) == "cannot be told"
