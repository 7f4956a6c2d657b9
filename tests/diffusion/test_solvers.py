"""Solvers and guidance on equations with closed-form answers."""

import math

import pytest
import torch

from diffusion_moe.diffusion.guidance import guided
from diffusion_moe.diffusion.solvers import EVALUATIONS_PER_STEP, SOLVERS, even_times


def decay(x, t):
    """dx/dt = -x + t, whose solution from x(0) = 1 is 2 exp(-t) + t - 1."""
    return -x + t


def error(solver, steps):
    x = SOLVERS[solver](decay, torch.ones(1, 1, 1, 1, dtype=torch.float64), even_times(steps).double())
    return abs(x.item() - 2 / math.e)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    assert math.log2(error(solver, 32) / error(solver, 64)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_function_evaluations_are_as_recorded(solver):
    calls = []
    SOLVERS[solver](lambda x, t: calls.append(t) or x, torch.ones(1), even_times(7))
    assert len(calls) == 7 * EVALUATIONS_PER_STEP[solver]


def test_a_straight_flow_is_solved_exactly_in_one_step():
    x0, x1 = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(SOLVERS["euler"](lambda x, t: x1 - x0, x0, even_times(1)), x1)


def test_guidance_extrapolates_inside_its_interval_only():
    velocity = guided(lambda x, t: x + 1, lambda x, t: x - 1, scale=1.5, interval=(0.25, 0.75))
    x = torch.zeros(1)
    assert velocity(x, torch.tensor(0.5)).item() == pytest.approx(-1 + 1.5 * 2)
    assert velocity(x, torch.tensor(0.25)).item() == pytest.approx(2.0)
    assert velocity(x, torch.tensor(0.2)).item() == 1
    assert velocity(x, torch.tensor(0.8)).item() == 1


def test_without_guidance_the_unconditional_model_is_not_evaluated():
    velocity = guided(lambda x, t: x + 1, lambda x, t: pytest.fail("evaluated"), scale=1.0)
    assert velocity(torch.zeros(1), torch.tensor(0.5)).item() == 1
