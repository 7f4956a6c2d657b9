"""Generated images are functions of (seed, number)."""

import pytest
import torch

from diffusion_moe.config import EvaluationConfig
from diffusion_moe.evaluation.generate import class_schedule, generate, image_grid, provenance, to_uint8
from diffusion_moe.moe import routers_of
from diffusion_moe.parsing import read_recipe
from diffusion_moe.training.step import make_state


@pytest.fixture(params=["dense", "tc", "ec", "diffmoe", "dsmoe"])
def model(request, tiny):
    """A small model of each rule with random weights also where initialisation says zero."""
    recipe = read_recipe("digits", [*tiny, f"--model.router={request.param}"])
    model = make_state(recipe, torch.device("cpu")).model.eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for router in routers_of(model):
        if hasattr(router, "threshold"):
            router.threshold.fill_(0.5)
    return model


def test_an_image_is_the_same_whatever_the_batch_size_and_number_of_images(model):
    whole = generate(model, class_schedule(9, 10), 9, EvaluationConfig(steps=3, batch_size=9))
    split = generate(model, class_schedule(9, 10), 9, EvaluationConfig(steps=3, batch_size=2))
    fewer = generate(model, class_schedule(4, 10), 4, EvaluationConfig(steps=3, batch_size=3))
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fewer, whole[:4], rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_another_seed_gives_other_images(model):
    one, two = (generate(model, class_schedule(3, 10), 3, EvaluationConfig(steps=2, seed=seed)) for seed in (0, 1))
    assert (one - two).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_guidance_extrapolates_the_velocity(model):
    """One Euler step from the same noise is linear in the guidance scale."""
    x = [
        generate(model, class_schedule(5, 10), 5, EvaluationConfig(steps=1, guidance_scale=scale))
        for scale in (0.0, 1.0, 2.5)
    ]
    torch.testing.assert_close(x[2], x[0] + 2.5 * (x[1] - x[0]), rtol=1e-4, atol=1e-4)
    assert (x[1] - x[0]).abs().max() > 1e-3


def test_an_unconditional_model_generates(tiny):
    recipe = read_recipe("digits", [*tiny, "--model.num_classes=0"])
    model = make_state(recipe, torch.device("cpu")).model.eval()
    images = generate(model, class_schedule(3, 0), 3, EvaluationConfig(steps=2))
    # A model that predicts zero velocity leaves the noise as it is.
    assert images.std() == pytest.approx(1, abs=0.2)


def test_classes_take_turns():
    assert class_schedule(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert class_schedule(5, 0) is None


def test_provenance_counts_model_evaluations():
    assert provenance(EvaluationConfig(solver="heun", steps=20))["function_evaluations"] == 40


def test_pixels_are_rounded_and_clipped():
    pixels = to_uint8(torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 3.0]))
    assert pixels.tolist() == [0, 0, 128, 191, 255, 255]


def test_the_grid_puts_images_in_rows():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    grid = image_grid(images, columns=3)[..., 0]
    assert grid.shape == (7, 10)
    assert [grid[1, 1].item(), grid[1, 4].item(), grid[1, 7].item()] == [0, 51, 102]
    assert [grid[5, 2].item(), grid[5, 5].item(), grid[5, 8].item()] == [153, 204, 255]
