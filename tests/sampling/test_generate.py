"""Generated images are functions of (seed, number)."""

import dataclasses

import pytest
import torch

from diffusion_moe.analysis.recorder import record_routing
from diffusion_moe.config import EvaluationConfig, read_recipe
from diffusion_moe.diffusion.ddpm import ddpm_ancestral, linear_schedule, respaced
from diffusion_moe.diffusion.solvers import even_times, sde
from diffusion_moe.models.token_drop import TokenDrop
from diffusion_moe.moe import routers_of
from diffusion_moe.pixels import image_grid, to_uint8
from diffusion_moe.randomness import normal
from diffusion_moe.routing_rules import RULES
from diffusion_moe.sampling.generate import SamplingStats, class_schedule, generate, sampling_metadata
from diffusion_moe.training.state import make_state


def randomised(model):
    """Random weights also where initialisation says zero."""
    for parameter in model.eval().parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=["dense", *RULES])
def model(request, tiny):
    """A small model of each rule."""
    recipe = read_recipe("digits", [*tiny, f"--model.router={request.param}"])
    model = randomised(make_state(recipe, torch.device("cpu")).model)
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


@pytest.mark.parametrize("solver", ["heun", "heun_euler", "sde"])
def test_every_solver_draws_an_image_for_itself(tiny, solver):
    recipe = read_recipe("digits", [*tiny, "--model.prediction=x", "--model.noise_scale=1.5"])
    model = randomised(make_state(recipe, torch.device("cpu")).model)
    whole, split = (
        generate(model, class_schedule(5, 10), 5, EvaluationConfig(steps=4, batch_size=size, solver=solver))
        for size in (5, 2)
    )
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_ddpm_models_draw_an_image_for_itself(tiny, solver, learn_sigma):
    ddpm = ["--model.process=ddpm", "--model.prediction=epsilon", f"--model.learn_sigma={str(learn_sigma).lower()}"]
    recipe = read_recipe("digits", [*tiny, *ddpm])
    model = randomised(make_state(recipe, torch.device("cpu")).model)
    stats, settings = SamplingStats(), EvaluationConfig(steps=4, batch_size=5, solver=solver, guidance_scale=2.0)
    whole = generate(model, class_schedule(5, 10), 5, settings, stats=stats)
    split = generate(model, class_schedule(5, 10), 5, dataclasses.replace(settings, batch_size=2))
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    assert stats.summary()["function_evaluations"] == 4
    with pytest.raises(ValueError, match="solver is euler, but the model's process is ddpm"):
        generate(model, class_schedule(5, 10), 5, EvaluationConfig())


def test_noise_has_the_models_scale_and_every_step_its_own(tiny):
    """A fresh model predicts zero velocity: Euler leaves the noise, and the SDE adds more of it."""
    recipe = read_recipe("digits", [*tiny, "--model.noise_scale=3.0"])
    model = make_state(recipe, torch.device("cpu")).model.eval()
    noise = [3 * normal(0, "sample", k, torch.arange(3), (1, 8, 8)) for k in range(4)]
    plain = generate(model, class_schedule(3, 10), 3, EvaluationConfig(steps=4))
    torch.testing.assert_close(plain, noise[0])
    sampled = generate(model, class_schedule(3, 10), 3, EvaluationConfig(steps=4, solver="sde"))
    expected = sde(lambda x, t: torch.zeros_like(x), noise[0], even_times(4), lambda k: noise[k + 1])
    torch.testing.assert_close(sampled, expected)


@pytest.mark.parametrize("options", [[], ["--model.router=diffmoe"]], ids=["dsmoe", "diffmoe"])
@pytest.mark.parametrize("pool", ["image", "batch"])
def test_guidance_runs_both_in_one_batch_unless_routing_would_mix_them(tiny, options, pool):
    recipe = read_recipe("digits", [*tiny, *options, f"--model.inference_pool={pool}"])
    model = randomised(make_state(recipe, torch.device("cpu")).model)
    for router in routers_of(model):
        if hasattr(router, "threshold"):
            router.threshold.fill_(0.5)
    seen = []
    model.register_forward_hook(lambda module, inputs, out: seen.append((len(inputs[0]), inputs[2].tolist())))
    images = generate(model, torch.tensor([4, 7]), 2, EvaluationConfig(steps=1, guidance_scale=2.0))
    mixed = pool == "batch" and bool(options)
    assert seen == ([(2, [4, 7]), (2, [10, 10])] if mixed else [(4, [4, 7, 10, 10])])
    noise = normal(0, "sample", 0, torch.arange(2), (1, 8, 8))
    with torch.no_grad():
        out, null = (model(noise, torch.tensor(0.0), torch.tensor(labels)).sample for labels in ([4, 7], [10, 10]))
    torch.testing.assert_close(images, noise + null + 2 * (out - null), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [None, 2])
def test_ddpm_guides_epsilon_and_not_its_variance(tiny, channels):
    ddpm = ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true", "--model.in_channels=3"]
    model = randomised(make_state(read_recipe("digits", [*tiny, *ddpm]), torch.device("cpu")).model)
    labels, null = torch.tensor([4, 7]), torch.full((2,), 10)
    noise = [normal(0, "sample", k, torch.arange(2), (3, 8, 8)) for k in range(4)]

    def guide(x, step):
        out, without = model(x, step, labels).sample, model(x, step, null).sample
        count = channels or 3
        return torch.cat((without[:, :count] + 2 * (out - without)[:, :count], out[:, count:]), dim=1)

    with torch.no_grad():
        expected = ddpm_ancestral(guide, noise[0], respaced(linear_schedule(), 3), lambda k: noise[k + 1])
    settings = EvaluationConfig(solver="ddpm", steps=3, guidance_scale=2.0, guidance_channels=channels)
    torch.testing.assert_close(generate(model, labels, 2, settings), expected, rtol=1e-4, atol=1e-4)


def test_the_adaptive_solver_reports_its_evaluations(tiny):
    # Dense: choosing experts makes the velocity jump, which no solver follows to the last digit.
    recipe = read_recipe("digits", [*tiny, "--model.router=dense"])
    model = randomised(make_state(recipe, torch.device("cpu")).model)
    fine = generate(model, class_schedule(2, 10), 2, EvaluationConfig(solver="heun", steps=200))
    counts = []
    for rtol, error in ((1e-2, 2e-2), (1e-5, 2e-4)):
        stats, settings = SamplingStats(), EvaluationConfig(solver="dopri5", rtol=rtol, atol=rtol / 100)
        images = generate(model, class_schedule(2, 10), 2, settings, stats=stats)
        assert (images - fine).abs().max() < error
        record = sampling_metadata(settings, stats)
        counts.append(record["function_evaluations"])
        assert record["steps"] is None and record["rtol"] == rtol and record["batch_size"] == settings.batch_size
    assert 0 < counts[0] < counts[1]


def test_thresholds_trade_compute_for_quality(tiny):
    model = randomised(make_state(read_recipe("digits", [*tiny, "--model.router=diffmoe"]), torch.device("cpu")).model)
    for router in routers_of(model):
        router.threshold.fill_(0.5)
    used, images = [], []
    for scale in (0.9, 1.0, 1.1):
        stats, settings = SamplingStats(), EvaluationConfig(steps=2, threshold_scale=scale)
        images.append(generate(model, class_schedule(4, 10), 4, settings, stats=stats))
        record = sampling_metadata(settings, stats)
        assert record["threshold_scale"] == scale
        used.append(record["average_capacity"])
    assert used[0] > used[1] > used[2]
    assert (images[0] - images[2]).abs().max() > 1e-4
    # The knob is turned back; and what is reported can be counted by hand.
    assert all(router.threshold_scale == 1 for router in routers_of(model))
    stats = SamplingStats()
    with torch.no_grad(), record_routing(model) as record:
        stats.note(model(torch.randn(3, 1, 8, 8), torch.tensor(0.5), torch.tensor([1, 2, 3])).routing)
    tokens = 3 * 16 * len(routers_of(model))
    assert stats.summary()["average_capacity"] == pytest.approx(record.counts().served_LSKE.sum() / tokens)
    dense = make_state(read_recipe("digits", [*tiny, "--model.router=dense"]), torch.device("cpu")).model.eval()
    with pytest.raises(ValueError, match="routers have thresholds"):
        generate(dense, class_schedule(1, 10), 1, EvaluationConfig(steps=1, threshold_scale=0.5))


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


def test_path_drop_guidance_leads_away_from_a_prediction_without_middle_blocks(tiny):
    fusion = ["--model.depth=3", "--model.fusion=true", "--model.first_k_full=1", "--model.last_k_full=1"]
    model = randomised(make_state(read_recipe("digits", [*tiny, *fusion]), torch.device("cpu")).model)
    labels, null = class_schedule(4, 10), torch.full((4,), 10)
    settings = EvaluationConfig(steps=2, batch_size=4, guidance_scale=3.0, path_drop_guidance=True)
    images = generate(model, labels, 4, settings)
    x = normal(0, "sample", 0, torch.arange(4), (1, 8, 8))
    with torch.no_grad():
        for t in (torch.zeros(4), torch.full((4,), 0.5)):
            weak = model(x, t, null, token_drop=TokenDrop(path=True)).sample
            x = x + 0.5 * (weak + 3.0 * (model(x, t, labels).sample - weak))
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="path_drop_guidance is true, but the model has no fusion"):
        generate(make_state(read_recipe("digits", tiny), torch.device("cpu")).model, labels, 4, settings)


def test_an_unconditional_model_generates(tiny):
    recipe = read_recipe("digits", [*tiny, "--model.num_classes=0"])
    model = make_state(recipe, torch.device("cpu")).model.eval()
    images = generate(model, class_schedule(3, 0), 3, EvaluationConfig(steps=2))
    # A model that predicts zero velocity leaves the noise as it is.
    assert images.std() == pytest.approx(1, abs=0.2)


def test_classes_take_turns():
    assert class_schedule(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert class_schedule(5, 0) is None


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 7), ("heun", 14), ("heun_euler", 13), ("sde", 7)])
def test_metadata_counts_model_evaluations(tiny, solver, evaluations):
    model = make_state(read_recipe("digits", tiny), torch.device("cpu")).model.eval()
    stats, settings = SamplingStats(), EvaluationConfig(solver=solver, steps=7, batch_size=2)
    generate(model, class_schedule(4, 10), 4, settings, stats=stats)
    record = sampling_metadata(settings, stats)
    assert record["function_evaluations"] == evaluations
    assert record["average_capacity"] == model.settings.top_k


def test_pixels_are_rounded_and_clipped():
    pixels = to_uint8(torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 3.0]))
    assert pixels.tolist() == [0, 0, 128, 191, 255, 255]


def test_the_grid_puts_images_in_rows():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    grid = image_grid(images, columns=3)[..., 0]
    assert grid.shape == (7, 10)
    assert [grid[1, 1].item(), grid[1, 4].item(), grid[1, 7].item()] == [0, 51, 102]
    assert [grid[5, 2].item(), grid[5, 5].item(), grid[5, 8].item()] == [153, 204, 255]
