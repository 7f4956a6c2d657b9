"""What training logged, and the loss on held-out images."""

import json

import numpy as np
import pytest
import torch

from diffusion_moe.analysis.losses import HELD_OUT_BINS, held_out_loss, read_curves
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.models import DiTOutput, make_model
from diffusion_moe.randomness import normal


def logged(tmp_path, *rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_curves(tmp_path / "metrics.jsonl", "run", "about")


def test_curves_of_usual_numbers(tmp_path):
    curves = logged(tmp_path, {"step": 20, "loss": 1.5, "imbalance": 1.25}, {"step": 40, "loss": 1.0})
    np.testing.assert_array_equal(curves.steps_W, [20, 40])
    np.testing.assert_array_equal(curves.loss_W, [1.5, 1.0])
    np.testing.assert_array_equal(curves.imbalance_W, [1.25, np.nan])
    assert curves.imbalance_WL.shape == curves.loss_WS.shape == (2, 0)
    assert (curves.run, curves.about) == ("run", "about")


def test_load_of_each_layer(tmp_path):
    rows = (
        {"step": 1, "moe_10/load_max": 3, "moe_2/load_max": 2},
        {"step": 2, "moe_2/load_max": 1.5, "moe_2/capacity": 9},
    )
    np.testing.assert_array_equal(logged(tmp_path, *rows).imbalance_WL, [[2, 3], [1.5, np.nan]])


def test_loss_by_time_runs_from_noise_to_data_and_has_gaps(tmp_path):
    rows = {"step": 1, "loss": 9}, {"step": 2, "loss_t0.0": 3, "loss_t0.5": float("nan"), "loss_t0.1": 2}
    curves = logged(tmp_path, *rows)
    np.testing.assert_array_equal(curves.loss_WS, [[np.nan] * 3, [3, 2, np.nan]])
    np.testing.assert_array_equal(curves.loss_W, [9, np.nan])
    turned = read_curves(tmp_path / "metrics.jsonl", "run", is_ddpm=True)
    np.testing.assert_array_equal(turned.loss_WS, curves.loss_WS[:, ::-1])


def test_numbers_of_other_shapes_are_gaps(tmp_path):
    curves = logged(tmp_path, {"step": 1, "moe_0/load_max": "?"}, {"step": 2, "loss": None, "imbalance": []})
    np.testing.assert_array_equal(curves.imbalance_WL, [[np.nan], [np.nan]])
    assert np.isnan(curves.loss_W).all() and np.isnan(curves.imbalance_W).all()


def test_damaged_lines_are_left_out_and_nothing_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n[1]\n{"loss": 3}\n{"step": 3, "lo')
    np.testing.assert_array_equal(read_curves(tmp_path / "metrics.jsonl", "run").steps_W, [1])
    assert read_curves(tmp_path / "nothing.jsonl", "run") is None
    assert logged(tmp_path) is None


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.prediction=x"],
        ["--model.prediction=epsilon"],
        ["--model.process=ddpm", "--model.prediction=epsilon"],
    ],
)
def test_a_model_that_answers_zero_costs_the_mean_square_of_the_truth(tiny, options, monkeypatch):
    recipe = read_recipe("digits", [*tiny, *options])
    data = load_dataset(recipe.data, "test")
    model = make_model(recipe.model).eval()
    monkeypatch.setattr(model, "forward", lambda x, t, labels: DiTOutput(sample=torch.zeros_like(x)))
    found = held_out_loss(model, recipe, data, "run", 4, seed=3)
    rows = [round(i * (len(data) - 1) / 255) for i in range(256)]
    images = data.read(rows).images
    np.testing.assert_array_equal(found.labels_I, data.read(rows).labels)
    np.testing.assert_allclose(found.times_S, np.arange(0.05, 1, 0.1))
    for s in range(HELD_OUT_BINS):
        noise = normal(3, "held_out", s, torch.arange(256), (1, 8, 8))
        truth = {"velocity": images - noise, "x": images, "epsilon": noise}[recipe.model.prediction]
        np.testing.assert_allclose(found.loss_IS[:, s], truth.square().mean((1, 2, 3)), rtol=1e-5)


def test_a_bound_of_the_loss_weighs_times(tiny, monkeypatch):
    """An answer of zero in place of x, in velocities: x over 1 - t, or over the bound."""
    options = [*tiny, "--model.prediction=x", "--diffusion.loss=velocity"]
    recipe, bounded = (read_recipe("digits", [*options, *more]) for more in ([], ["--diffusion.loss_min_gap=0.4"]))
    data = load_dataset(recipe.data, "test")
    model = make_model(recipe.model).eval()
    monkeypatch.setattr(model, "forward", lambda x, t, labels: DiTOutput(sample=torch.zeros_like(x)))
    free, held = (held_out_loss(model, r, data, "run", 4, seed=3) for r in (recipe, bounded))
    weight_S = ((1 - free.times_S) / np.maximum(1 - free.times_S, 0.4)) ** 2
    np.testing.assert_allclose(held.loss_IS, free.loss_IS * weight_S, rtol=1e-5)


def test_the_network_gets_times_classes_and_noisy_images(tiny, monkeypatch):
    """The middle of each bin, counted from noise; the classes; noisy images of the right mixture."""
    for options, times in (([], lambda t: t), (["--model.process=ddpm", "--model.prediction=epsilon"], None)):
        recipe = read_recipe("digits", [*tiny, *options])
        model, calls = make_model(recipe.model).eval(), []

        def answer(x, t, labels, calls=calls):
            calls.append((float(t[0]), float(t[-1]), float(x.std()), labels.tolist()))
            return DiTOutput(sample=torch.zeros_like(x))

        monkeypatch.setattr(model, "forward", answer)
        data = load_dataset(recipe.data, "test")
        found = held_out_loss(model, recipe, data, "run", None)
        first = [call[0] for call in calls]
        if times is not None:
            np.testing.assert_allclose(first, found.times_S, rtol=1e-6)
        else:
            np.testing.assert_array_equal(first, np.arange(950, 0, -100))
        assert all(call[0] == call[1] and call[3] == found.labels_I.tolist() for call in calls)
        assert abs(calls[0][2] - 1) < 0.1  # nearly pure noise


def test_the_same_images_and_noise_whatever_the_size_of_a_pass(tiny, monkeypatch):
    recipe = read_recipe("digits", tiny)
    model = make_model(recipe.model).eval()
    data = load_dataset(recipe.data, "test")
    whole = held_out_loss(model, recipe, data, "run", 4)
    monkeypatch.setattr("diffusion_moe.analysis.losses.PASS", 100)
    np.testing.assert_allclose(held_out_loss(model, recipe, data, "run", 4).loss_IS, whole.loss_IS, rtol=1e-5)
