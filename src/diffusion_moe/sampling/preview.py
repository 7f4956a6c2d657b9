"""Images of a model while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Recipe
from ..data import load_dataset
from ..distributed import is_main
from ..models import Backbone
from ..pixels import image_grid, to_image
from .generate import Prompts
from .loading import load_decoder
from .sampler import Sampler
from .source import Source, with_data

ROWS, COLUMNS = 4, 8


def previews_of(recipe: Recipe) -> Callable[[Backbone, Path], None]:
    """A function that writes a model's images to a file: of the same noise and classes at every step.

    All processes generate them, as a model may be sharded over them; the main one writes.

    Raises:
        ValueError: the model works on latents whose VAE is not known.
    """
    dataset = load_dataset(recipe.data, "train", recipe.training.seed)
    count, classes = ROWS * COLUMNS, recipe.model.num_classes
    settings = replace(recipe.evaluation, batch_size=count)
    if not recipe.model.guidable:
        settings = replace(settings, guidance_scale=1.0)
    source = with_data(Source(Path(), Path(), recipe.model, settings), dataset.metadata(), Path("the data"))
    if source.vae is None and recipe.model.in_channels not in (1, 3):
        raise ValueError(
            f"logging.sample_every is {recipe.logging.sample_every}, but the data does not say which VAE decodes "
            "its latents; set it to 0"
        )
    vae = load_decoder(source)
    labels = torch.arange(count) * classes // count if classes else None
    text = dataset.first_texts(torch.arange(count) % len(dataset)) if recipe.model.text_dim else None
    prompts = None if text is None else Prompts(text, text.nothing())

    def preview(model: Backbone, path: Path) -> None:
        decoder = None if vae is None else vae.to(model.device)
        images = Sampler(source, model, settings, decoder).images(count, labels, prompts)
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            to_image(image_grid(images, COLUMNS)).save(path)

    return preview
