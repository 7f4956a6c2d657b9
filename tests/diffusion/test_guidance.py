"""Guidance against its formula, and where it is on."""

import pytest
import torch

from diffusion_moe.diffusion.guidance import guided, inside


def above(x, t):
    return x + 1


def below(x, t):
    return x - 1


def test_guidance_extrapolates_inside_its_interval_only():
    model = guided(above, below, scale=1.5, interval=(0.25, 0.75))
    x = torch.zeros(1, 1)
    assert model(x, torch.tensor(0.5)).item() == pytest.approx(-1 + 1.5 * 2)
    assert model(x, torch.tensor(0.2)).item() == 1
    assert model(x, torch.tensor(0.8)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_outside_save_zero_and_one(dtype):
    times = torch.linspace(0, 1, 11, dtype=dtype)
    assert [inside(t, (0.0, 1.0)) for t in times] == [True] * 11
    assert [inside(t, (0.1, 1.0)) for t in times] == [False] * 2 + [True] * 9
    assert [inside(t, (0.0, 0.7)) for t in times] == [True] * 7 + [False] * 4


def test_steps_are_inside_the_whole_interval():
    model = guided(above, below, scale=2.0)
    assert model(torch.zeros(1, 1), torch.tensor(999)).item() == -1 + 2 * 2


def test_without_guidance_the_unconditional_model_is_not_evaluated():
    model = guided(above, lambda x, t: pytest.fail("evaluated"), scale=1.0)
    assert model(torch.zeros(1, 1), torch.tensor(0.5)).item() == 1


def test_channels_beyond_the_guided_stay_conditional():
    """Four channels of epsilon and four of variance, of which three are guided, as in the papers' DDPM sampling."""
    conditional, unconditional = torch.randn(2, 2, 8, 3, 3)
    model = guided(lambda x, t: conditional, lambda x, t: unconditional, scale=4.0, channels=3)
    output = model(torch.zeros(2, 4, 3, 3), torch.tensor(7))
    expected = unconditional[:, :3] + 4 * (conditional - unconditional)[:, :3]
    torch.testing.assert_close(output[:, :3], expected)
    torch.testing.assert_close(output[:, 3:], conditional[:, 3:], rtol=0, atol=0)
