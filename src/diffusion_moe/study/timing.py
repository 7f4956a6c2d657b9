"""Seconds of a training step, of all variants in turns: runs that train at different hours do not compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..benchmarks.measure import interleaved, machine
from ..config import Recipe
from ..data import load_dataset
from ..distributed import choose_device
from ..training.state import make_state
from ..training.step import train_step
from .definition import Study
from .records import recipe_hashes

SECONDS = 60.0
"""Approximate time of timing a scale; slow steps take longer, for each variant takes at least three."""


def time_scale(study: Study, scale: str) -> dict[str, Any]:
    """The timing of a scale: median seconds of a step by variant. Loading of images is not counted.

    All variants are in memory at once.
    """
    recipes = {name: recipe for (name, at), recipe in study.recipes.items() if at == scale}
    device = choose_device(study.recipes[study.fields.reference, scale].training.device, "training.device")
    times = interleaved([_step(recipe, device) for recipe in recipes.values()], SECONDS, device)
    return {
        "scale": scale,
        "step_seconds": {name: found.median for name, found in zip(recipes, times, strict=True)},
        "recipe_hashes": recipe_hashes(study, scale),
        "machine": machine(device),
    }


def _step(recipe: Recipe, device: torch.device) -> Callable[[], object]:
    """A training step of a new model on the first images."""
    state = make_state(recipe, device)
    dataset = load_dataset(recipe.data, "train", recipe.training.seed)
    indices = torch.arange(recipe.training.batch_size) % len(dataset)
    batch = dataset.read(indices.tolist())._replace(
        text=dataset.first_texts(indices) if recipe.model.text_dim else None
    )
    return lambda: train_step(state, recipe, batch)
