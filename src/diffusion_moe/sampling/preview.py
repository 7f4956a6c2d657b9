"""Pictures of what a model draws while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..config import Recipe
from ..data import load_dataset
from ..data.latent_space import LatentSpace
from ..distributed import is_main
from ..models import Backbone
from ..pixels import image_grid
from .generate import Prompts, generate
from .source import load_vae

ROWS, COLUMNS = 4, 8


def previews_of(recipe: Recipe) -> Callable[[Backbone, Path], None]:
    """A function that draws a model's images into a file: the same noise and classes at every step.

    All processes draw them, for a model may be spread over them; the main one writes.

    Raises:
        ValueError: the model works on latents whose VAE is not known.
    """
    dataset = load_dataset(recipe.data, "train", recipe.training.seed)
    vae, record = None, dataset.metadata()
    if recipe.model.in_channels not in (1, 3):
        if "latent_space" not in record:
            raise ValueError(
                f"logging.sample_every is {recipe.logging.sample_every}, but the data does not say which VAE decodes "
                "its latents; set it to 0"
            )
        space = LatentSpace.from_dict(record["latent_space"])
        vae = load_vae(space.vae)
        space.claim(vae, space.vae)
    count, classes = ROWS * COLUMNS, recipe.model.num_classes
    labels = torch.arange(count) * classes // count if classes else None
    settings = replace(recipe.evaluation, batch_size=count)
    text = dataset.first_texts(torch.arange(count) % len(dataset)) if recipe.model.text_dim else None
    prompts = None if text is None else Prompts(text, text.nothing())
    if not recipe.model.guidable:
        settings = replace(settings, guidance_scale=1.0)

    def preview(model: Backbone, path: Path) -> None:
        decoder = None if vae is None else vae.to(model.device)
        pixels = image_grid(generate(model, labels, count, settings, decoder, prompts=prompts), COLUMNS)
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            array = pixels.numpy()
            Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)

    return preview
