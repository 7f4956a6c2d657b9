"""Path, times and loss against their formulas."""

import pytest
import torch

from diffusion_moe.config import DiffusionConfig
from diffusion_moe.diffusion.path import rectified_flow
from diffusion_moe.diffusion.times import sample_times

SAMPLES = torch.arange(20000)


def test_path_runs_from_noise_to_data_at_constant_velocity():
    x1, x0 = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    point = rectified_flow(x1, x0, torch.tensor([0.0, 1.0, 0.25]))
    torch.testing.assert_close(point.x_t[0], x0[0])
    torch.testing.assert_close(point.x_t[1], x1[1])
    torch.testing.assert_close(point.x_t[2], x0[2] + 0.25 * point.velocity[2])
    torch.testing.assert_close(point.velocity, x1 - x0)


def test_uniform_times_fill_the_unit_interval():
    t = sample_times(DiffusionConfig(), seed=1, step=5, samples=SAMPLES)
    histogram = torch.histc(t, bins=10, min=0, max=1) / len(t)
    assert (histogram - 0.1).abs().max() < 0.01


def test_logit_normal_times_have_the_normal_under_the_logistic():
    t = sample_times(DiffusionConfig(time="logit_normal", time_mean=-0.8, time_std=0.8), 1, 5, SAMPLES).double()
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_a_time_depends_on_its_sample_alone(kind):
    config = DiffusionConfig(time=kind)
    whole = sample_times(config, 3, 7, torch.arange(64))
    torch.testing.assert_close(sample_times(config, 3, 7, torch.tensor([40, 2])), whole[[40, 2]], rtol=0, atol=0)
    assert not torch.equal(sample_times(config, 3, 8, torch.arange(64)), whole)
