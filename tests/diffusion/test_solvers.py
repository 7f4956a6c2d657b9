"""Solvers on equations with closed-form answers."""

import math
from functools import partial

import pytest
import torch

from diffusion_moe.diffusion.solvers import SOLVERS, Counted, dopri5, even_times, sde


def decay(x, t):
    """dx/dt = -x + t, whose solution from x(0) = 1 is 2 exp(-t) + t - 1."""
    return -x + t


def error(solver, steps):
    x = SOLVERS[solver](decay, torch.ones(1, 1, 1, 1, dtype=torch.float64), even_times(steps).double())
    return abs(x.item() - 2 / math.e)


def normal_flow(x, t, mean, variance):
    """The exact velocity from standard normal noise to normal data: E[x1 - x0 | x_t]."""
    slope = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
    return mean + slope * (x - t * mean)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("heun_euler", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    assert math.log2(error(solver, 32) / error(solver, 64)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_dopri5_keeps_its_tolerance_and_pays_for_it(tolerance):
    velocity, x = Counted(decay), torch.ones(1, dtype=torch.float64)
    assert abs(dopri5(velocity, x, rtol=tolerance, atol=tolerance).item() - 2 / math.e) < tolerance
    loose = Counted(decay)
    dopri5(loose, x, rtol=1.0, atol=1.0)
    assert velocity.evaluations >= loose.evaluations > 0


def test_dopri5_gives_times_as_scalars_from_zero_to_one():
    seen = []
    dopri5(lambda x, t: seen.append(t) or -x, torch.ones(2, 1, 2, 2))
    assert {t.ndim for t in seen} == {0}
    assert min(seen) == 0
    assert max(seen) >= 1


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 7), ("heun", 14), ("heun_euler", 13)])
def test_evaluations_are_counted(solver, evaluations):
    velocity = Counted(lambda x, t: x)
    SOLVERS[solver](velocity, torch.ones(1), even_times(7))
    assert velocity.evaluations == evaluations


def test_heun_with_an_euler_step_last_never_looks_at_the_end():
    seen = []
    SOLVERS["heun_euler"](lambda x, t: seen.append(float(t)) or x, torch.ones(1), even_times(4))
    assert seen == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_solved_exactly_in_one_step(solver):
    x0, x1 = torch.randn(2, 2, 1, 3, 3)
    torch.testing.assert_close(SOLVERS[solver](lambda x, t: x1 - x0, x0, even_times(1)), x1)


@pytest.mark.parametrize(("mean", "deviation"), [(1.5, 0.5), (-0.5, 2.0)])
def test_the_sde_ends_with_the_moments_of_the_data(mean, deviation):
    generator = torch.Generator().manual_seed(0)
    count, steps = 40_000, 100
    draws = torch.randn(steps, count, 1, generator=generator)
    velocity = Counted(partial(normal_flow, mean=mean, variance=deviation**2))
    x = sde(velocity, torch.randn(count, 1, generator=generator), even_times(steps), lambda k: draws[k])
    assert velocity.evaluations == steps
    assert x.mean().item() == pytest.approx(mean, abs=4 * deviation / count**0.5 + 0.01)
    assert x.std().item() == pytest.approx(deviation, rel=0.02)


def test_the_sde_forgets_where_it_started():
    """The ODE keeps its starts' order; the SDE's correlation with them decays at rate w / (2 variance of x_t)."""
    generator = torch.Generator().manual_seed(0)
    start, velocity = torch.randn(5000, 1, generator=generator), partial(normal_flow, mean=0.0, variance=1.0)
    ends = {
        "ode": SOLVERS["euler"](velocity, start, even_times(50)),
        "sde": sde(velocity, start, even_times(50), lambda k: torch.randn(5000, 1, generator=generator)),
    }
    correlation = {name: torch.corrcoef(torch.cat((start, x), 1).T)[0, 1].item() for name, x in ends.items()}
    assert correlation["ode"] == pytest.approx(1, abs=1e-4)
    # exp of minus the integral of (1 - t) / (2 (t^2 + (1 - t)^2)) from 0 to 1.
    assert correlation["sde"] == pytest.approx(math.exp(-math.pi / 8), abs=0.02)


def test_the_sde_draws_once_a_step_but_the_last_and_ends_on_a_single_image():
    image, drawn = torch.randn(1, 2, 3, 3), []

    def noise(k):
        drawn.append(k)
        return torch.randn(1, 2, 3, 3)

    # All data are this image, so x_t = t image + (1 - t) epsilon gives the velocity.
    x = sde(lambda x, t: (image - x) / (1 - t), torch.randn(1, 2, 3, 3), even_times(5), noise)
    torch.testing.assert_close(x, image)
    assert drawn == [0, 1, 2, 3]
