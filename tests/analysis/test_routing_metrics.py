"""What counts of routing mean."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_moe.analysis.routing_metrics import (
    coactivation,
    cosines,
    dead_experts,
    duplicate_experts,
    effective_experts,
    estimate,
    evenly_spaced,
    expert_maps,
    imbalance,
    moving_average,
    ratio,
    shares,
    total_variation,
    varies,
)


def test_a_ratio_of_nothing_is_unknown():
    np.testing.assert_array_equal(ratio(np.array([1, 0, 3]), np.array([2, 0, 4])), [0.5, np.nan, 0.75])


def test_estimates_are_ratios_of_totals_with_the_standard_error_of_the_groups():
    """The groups' ratios are 1, 2 and 3: standard deviation 1, error 1 / sqrt(3)."""
    found = estimate(np.array([[1.0], [4.0], [9.0]]), np.array([[1.0], [2.0], [3.0]]))
    assert found.mean == pytest.approx(14 / 6)
    assert found.error == pytest.approx(3**-0.5)


def test_one_group_tells_no_error():
    found = estimate(np.array([[2.0, 3.0], [4.0, 0.0]]), np.array([[1.0, 1.0], [2.0, 0.0]]))
    np.testing.assert_array_equal(found.mean, [2, 3])
    np.testing.assert_array_equal(found.error, [0, np.nan])


@given(arrays(float, (3, 6), elements=st.floats(0, 1e3)).filter(lambda served: (served.sum(1) > 1e-6).all()))
@settings(deadline=None)
def test_loads_are_between_even_and_one_expert_alone(served):
    share = shares(served)
    np.testing.assert_allclose(share.sum(1), 1)
    assert ((imbalance(share) >= 1 - 1e-12) & (imbalance(share) <= 6 + 1e-12)).all()
    assert ((effective_experts(share) >= 1 - 1e-9) & (effective_experts(share) <= 6 + 1e-9)).all()


@pytest.mark.parametrize("busy", [1, 2, 5])
def test_so_many_equally_busy_experts(busy):
    share = shares(np.array([3.0] * busy + [0.0] * (5 - busy)))
    assert effective_experts(share) == pytest.approx(busy)
    assert imbalance(share) == pytest.approx(5 / busy)


def test_dead_experts_are_below_a_hundredth_of_an_even_load():
    share = shares(np.array([[1.0, 1.0], [1.0, 0.0049], [1.0, 0.0052]]))
    assert dead_experts(share) == [(1, 1)]


def test_coactivation_is_a_conditional_probability():
    together = coactivation(np.array([[[4, 1, 0], [1, 2, 2], [0, 2, 8]]]))
    np.testing.assert_allclose(together, [[[np.nan, 0.25, 0], [0.5, np.nan, 1], [0, 0.25, np.nan]]])


def test_total_variation_is_what_has_to_move():
    assert total_variation(np.array([0.5, 0.5, 0]), np.array([0.2, 0.5, 0.3])) == pytest.approx(0.3)
    assert total_variation(np.array([1.0, 0]), np.array([0.0, 1])) == 1


def expert(rng, D=5, F=4):
    return rng.normal(size=(D, 2 * F)), rng.normal(size=(F, D))


def test_experts_of_permuted_and_rescaled_units_are_duplicates_and_others_are_not():
    rng = np.random.default_rng(0)
    (w_in, w_out), other = expert(rng), expert(rng)
    order = rng.permutation(4)
    permuted = np.concatenate((w_in[:, :4][:, order], w_in[:, 4:][:, order]), axis=1), w_out[order]
    stretched = w_in * 3, w_out
    stack = [np.stack(part) for part in zip((w_in, w_out), permuted, stretched, other, strict=True)]
    cosine = cosines(expert_maps(*stack))
    np.testing.assert_allclose(cosine[:3, :3], 1)
    assert np.abs(cosine[3, :3]).max() < 0.8
    assert duplicate_experts(cosine[None]) == [(0, 0, 1), (0, 0, 2), (0, 1, 2)]


def test_expert_maps_are_the_products():
    rng = np.random.default_rng(0)
    w_in, w_out = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4, 3))
    np.testing.assert_allclose(expert_maps(w_in, w_out)[1], (w_in[1] @ w_out[1]).ravel())


def test_cosines_of_a_zero_vector_are_unknown():
    np.testing.assert_allclose(cosines(np.array([[1.0, 0], [1, 1], [0, 0]]))[0], [1, 2**-0.5, np.nan])


def test_values_vary_or_not():
    assert varies(np.array([1, np.nan, 1.1]))
    assert not varies(np.array([2.0, np.nan, 2.0]))
    assert not varies(np.array([np.nan]))


def test_moving_averages():
    np.testing.assert_allclose(moving_average(np.array([1.0, 2, 3, 6]), 2), [1.5, 2.5, 4.5])
    assert moving_average(np.array([]), 1).size == 0


@given(st.integers(1, 200), st.integers(1, 40))
def test_spread_out_numbers_rise_from_the_first_to_the_last(count, wanted):
    numbers = evenly_spaced(count, wanted)
    assert len(numbers) == min(count, wanted) and numbers[0] == 0
    assert wanted == 1 or numbers[-1] == count - 1
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)
