"""Checks that a recipe, the data, a run folder and this machine fit each other."""

from __future__ import annotations

import dataclasses

import torch

from ..config import ModelConfig, Recipe
from ..data import ImageDataset
from ..distributed import from_main
from ..moe.precision import Chosen, choose_precision
from ..run_folder import Resume, RunFolder, write_atomically


def check_fit(recipe: Recipe, dataset: ImageDataset) -> None:
    """Check that the model fits the data.

    Raises:
        ValueError: the images' shape, the number of classes or the text features are not the model's.
    """
    model, image = recipe.model, dataset.read([0]).images[0]
    expected = (model.in_channels, model.sample_size, model.sample_size)
    if dataset.buckets is not None:
        for height, width in dataset.bucket_sizes:
            if height % model.patch_size or width % model.patch_size:
                raise ValueError(
                    f"data.buckets holds {height}x{width}, but model.patch_size {model.patch_size} must divide both"
                )
        expected = (model.in_channels, *image.shape[1:])
    if tuple(image.shape) != expected:
        raise ValueError(
            f"the data's images are {tuple(image.shape)} (channels, height, width), but model.in_channels and "
            f"model.sample_size say {expected}; {dataset.shape_remedy}"
        )
    check_text(recipe.model, dataset)
    if model.num_classes not in (0, len(dataset.class_names)):
        raise ValueError(
            f"model.num_classes is {model.num_classes}, but the data has {len(dataset.class_names)} classes; set it to "
            f"{len(dataset.class_names)}, or to 0 for a model without classes"
        )


def check_text(model: ModelConfig, dataset: ImageDataset) -> None:
    """Check that the captions' features are those the model takes.

    Raises:
        ValueError: there are none, or they have another size.
    """
    if not model.text_dim:
        return
    if dataset.texts is None:
        raise ValueError(
            f"model.text_dim is {model.text_dim}, but the data has no encoded captions; give data.text_encoder and "
            "data.caption_column, or a cache made with `diffusion-moe encode --captions`"
        )
    space = dataset.texts.space
    wanted = (model.text_dim, model.text_pooled_dim or space.pooled_width)
    if (space.width, space.pooled_width) != wanted:
        raise ValueError(
            f"the text encoder {space.encoder} gives features of width {space.width} and pooled ones of "
            f"{space.pooled_width}, but model.text_dim is {model.text_dim} and model.text_pooled_dim "
            f"{model.text_pooled_dim}; make them equal (model.text_pooled_dim may be 0)"
        )
    if space.length > model.text_length:
        raise ValueError(
            f"captions have up to {space.length} tokens, but model.text_length is {model.text_length}; raise it, or "
            "cut the captions to it"
        )


def check_same_images(recipe: Recipe, dataset: ImageDataset, run: RunFolder, resume: Resume) -> None:
    """Compare the images with those the run began with, and store their hash; on the main process only.

    Raises:
        ValueError: they are others, which changes the order of training, and `resume` is not `changed`.
    """
    found = dataset.identity()
    if found is None:
        return
    began = run.listing.read_text().strip() if run.listing.is_file() else found
    if began != found and resume != "changed":
        raise ValueError(
            f"data.path {recipe.data.path} holds other images than when {run.path} began: files were added, removed, "
            "renamed or moved; resume with them by --resume changed, or choose another --output_dir"
        )
    if began != found or not run.listing.is_file():
        write_atomically(run.listing, found + "\n")


def resolve_precision(recipe: Recipe, run: RunFolder, resume: Resume, device: torch.device) -> tuple[Recipe, Chosen]:
    """The recipe with precision `auto` resolved: to that of the run in the folder, else to the best of the device.

    The main process decides for all. Fields that the run's recipe lacks keep the run's behaviour, unless the recipe is
    changed on purpose.

    Returns:
        The recipe, and its precision with the reason.

    Raises:
        ValueError: the run's recipe cannot be read.
    """
    training, chosen = recipe.training, choose_precision(recipe.training.precision, device)
    if run.recipe.is_file():
        began = run.read_recipe().training.precision
        if training.precision == "auto" and began != "auto":
            chosen = Chosen(began, "as the run began")
    older = {} if resume == "changed" else from_main(run.older_training())
    chosen = from_main(chosen)
    training = dataclasses.replace(training, precision=chosen.precision, **older)
    return dataclasses.replace(recipe, training=training), chosen
