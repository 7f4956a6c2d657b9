"""Conversions between predictions, and the losses in their spaces, against the formulas of the path."""

from itertools import permutations
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_moe.diffusion.loss import flow_loss
from diffusion_moe.diffusion.path import rectified_flow
from diffusion_moe.diffusion.prediction import Prediction, convert

KINDS = get_args(Prediction)


def point(t_B, channels=2):
    """A point on the path from normal noise to normal data, float64."""
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, len(t_B), channels, 3, 3, generator=generator, dtype=torch.float64)
    return rectified_flow(x1, x0, t_B)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@given(t=st.floats(0.01, 0.99))
def test_each_prediction_gives_the_others_on_the_path(source, target, t):
    here = point(torch.tensor([t, 1 - t], dtype=torch.float64))
    converted = convert(getattr(here, source), here.x_t, here.t, source, target)
    torch.testing.assert_close(converted, getattr(here, target), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), permutations(KINDS, 2))
@given(t=st.floats(0.01, 0.99))
def test_there_and_back_is_the_identity_also_off_the_path(source, target, t):
    t = torch.tensor(t, dtype=torch.float64)
    value, x_t = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    there = convert(value, x_t, t, source, target)
    torch.testing.assert_close(convert(there, x_t, t, target, source), value, rtol=1e-9, atol=1e-9)


def test_the_gap_bounds_the_division():
    ones, zeros = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    t = torch.tensor([0.8, 1.0])
    assert convert(ones, zeros, t, "x", "velocity", 0.05).flatten().tolist() == pytest.approx([5, 20])
    assert convert(ones, zeros, 1 - t, "epsilon", "velocity", 0.05).flatten().tolist() == pytest.approx([-5, -20])


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("space", KINDS)
def test_the_truth_costs_nothing_even_where_the_gap_is_clamped(prediction, space):
    here = point(torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0], dtype=torch.float64))
    truth = torch.cat((getattr(here, prediction), torch.randn(5, 2, 3, 3)), dim=1)
    assert flow_loss(truth, here, prediction, space, min_gap=0.05).tolist() == [0] * 5


def test_a_velocity_is_compared_with_data_less_noise():
    here, output = point(torch.rand(4), channels=4), torch.randn(4, 8, 3, 3)
    expected = torch.stack([(output[i, :4] - (here.x - here.epsilon)[i].float()).square().mean() for i in range(4)])
    torch.testing.assert_close(flow_loss(output, here), expected)


def test_jit_compares_velocities_of_clean_images_over_a_clamped_gap():
    here, output = point(torch.tensor([0.3, 0.99])), torch.randn(2, 2, 3, 3)
    loss = flow_loss(output, here, "x", "velocity", min_gap=0.05)
    error = (output - here.x.float()).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, error / torch.tensor([0.7, 0.05]) ** 2)


def test_the_loss_of_a_half_precision_answer_is_taken_in_float32():
    here, output = point(torch.rand(3)), torch.randn(3, 2, 3, 3).bfloat16()
    torch.testing.assert_close(flow_loss(output, here), flow_loss(output.float(), here), rtol=0, atol=0)
