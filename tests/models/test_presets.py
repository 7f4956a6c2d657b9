"""The shipped recipes against what the published configurations and training scripts say."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from diffusion_moe.config import read_recipe as read
from diffusion_moe.models import DiT, JiT
from diffusion_moe.models.presets import make_preset, model_preset, preset_names

read_recipe = cache(read)

PUBLISHED = json.loads((Path(__file__).parent / "published_sizes.json").read_text())
OWN = {"digits", "image-folder", "pictures", "shapes-t2i"}
"""Recipes that are no paper's."""
LATER = {"promoe-s-e14"}
"""Recipes of papers that came after the two; tests/models/test_sizes.py compares their sizes."""
PAPERS = sorted(name for name in set(preset_names()) - OWN - LATER if not name.startswith("t2i-"))
IMAGES = 1_281_167  # ImageNet's training images


def test_every_published_architecture_has_a_recipe():
    assert set(PAPERS) == {*PUBLISHED, "diffmoe-l-e8-ddpm", "dit-xl-ddpm"}


@pytest.mark.parametrize("name", PAPERS)
def test_architectures_are_the_published_ones(name):
    config = read_recipe(name).model
    published = PUBLISHED[name.removesuffix("-ddpm")]["model"]
    assert {key: getattr(config, key) for key in published} == published
    assert (config.process == "ddpm") == name.endswith("-ddpm")


@pytest.mark.parametrize("name", PAPERS)
def test_training_is_the_published_one(name):
    recipe = read_recipe(name)
    optimizer, training, evaluation = recipe.optimizer, recipe.training, recipe.evaluation
    steps_a_epoch = IMAGES // training.batch_size
    if recipe.model.backbone == "jit":
        assert training.batch_size == 1024
        assert optimizer.learning_rate == pytest.approx(5e-5 * training.batch_size / 256)
        assert (optimizer.betas, optimizer.warmup_steps) == ((0.9, 0.95), 5 * steps_a_epoch)
        assert training.steps == 600 * steps_a_epoch
        assert (recipe.diffusion.loss, recipe.diffusion.time) == ("velocity", "logit_normal")
        assert (evaluation.solver, evaluation.steps, evaluation.guidance_scale) == ("heun_euler", 50, 2.9)
    else:
        assert (training.batch_size, optimizer.learning_rate) == (512, 1e-4)
        assert (optimizer.betas, optimizer.warmup_steps) == ((0.9, 0.999), 0)
        assert training.steps == (7_000_000 if "-e8" in name or "-ddpm" in name else 700_000)
        assert (recipe.diffusion.loss, recipe.diffusion.time) == (None, "uniform")
        solver = "ddpm" if name.endswith("-ddpm") else "euler"
        assert (evaluation.solver, evaluation.steps, evaluation.guidance_scale) == (solver, 250, 1.5)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.schedule) == (0, None, "constant")
    assert (training.ema_decay, recipe.diffusion.class_dropout) == (0.9999, 0.1)
    assert (recipe.data.test_fraction, evaluation.num_samples) == (0, 50_000)


def test_a_preset_is_the_recipe_s_model():
    with torch.device("meta"):
        for name, backbone in (("dsmoe-s-e16", DiT), ("jitmoe-b-16-e16", JiT)):
            config = read_recipe(name).model
            assert backbone(**model_preset(name)).settings == config
            made = make_preset(name)
            assert type(made) is backbone
            assert made.settings == config


def test_a_mistyped_preset_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"no recipe 'dsmoe-s-e61'; did you mean dsmoe-s-e16"):
        model_preset("dsmoe-s-e61")
