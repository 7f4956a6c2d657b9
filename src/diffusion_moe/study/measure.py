"""Measurements of a finished run: held-out loss by noise level, gap to the training images, FD and KID."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..benchmarks.measure import machine
from ..config import Recipe
from ..counts import model_flops, model_size
from ..data import ImageDataset, load_dataset
from ..diffusion.ddpm import DDPM_STEPS
from ..distributed import choose_device, to_device
from ..evaluation.evaluate import score_model
from ..evaluation.features import CLASSIFIER
from ..evaluation.make_statistics import evenly, make_statistics
from ..evaluation.options import ReferenceOptions, StatsOptions
from ..evaluation.scorer import make_scorer
from ..log import Log
from ..models import Backbone, load_model
from ..randomness import derive_seed, normal, uniform
from ..run_folder import RunFolder
from ..sampling.sampler import load_sampler
from ..sampling.source import read_source
from ..training.loss import loss_at
from .curves import read_curves
from .definition import Study, StudyRun

LEVELS = 10
"""Noise levels: parts of equal width of the time from 0 (noise) to 1 (data)."""
LEVEL_IMAGES = 512
"""Most images of a split whose loss is computed at each level, evenly spread."""
LEVEL_BATCH = 64
"""Images at a time, the same for all variants: where a batch is routed together, the loss depends on it."""


def measure_run(study: Study, run: StudyRun, folder: Path, log: Log) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        study: the study.
        run: one of its runs.
        folder: the run's folder.
        log: receives lines of progress.
    """
    recipe, files = run.recipe, RunFolder(folder)
    training, size = recipe.training, model_size(recipe.model)
    device = choose_device(training.device, "training.device")
    curves = read_curves(files.metrics, training.batch_size, training.ema_decay)
    model = load_model(files.model).to(device).eval()
    held_out = losses_by_level(model, recipe, load_dataset(recipe.data, "test", training.seed), device)
    seen = losses_by_level(model, recipe, load_dataset(recipe.data, "train", training.seed), device)
    return {
        "variant": run.variant,
        "scale": run.scale,
        "seed": run.seed,
        "recipe_hash": run.hash,
        "val_loss": curves.held_out[-1].loss,
        "val_loss_by_level": held_out,
        "train_loss_by_level": seen,
        "gap": sum(held_out) / LEVELS - sum(seen) / LEVELS,
        **quality(study, recipe, folder, log),
        "seconds": curves.seconds,
        "images": training.steps * training.batch_size,
        "activated": size.activated,
        "total": size.total,
        "flops": model_flops(recipe.model).total,
        "train_curve": curves.training,
        "val_curve": curves.held_out,
        "machine": machine(device),
    }


@torch.no_grad()
def losses_by_level(model: Backbone, recipe: Recipe, dataset: ImageDataset, device: torch.device) -> list[float]:
    """Mean loss of images at each noise level, from noise to data.

    Noise and time of an image are functions of (seed, level, its number), so all variants have the same.
    """
    seed = derive_seed(recipe.training.seed, "validation", 1)
    chosen = torch.tensor(evenly(len(dataset), LEVEL_IMAGES))
    sums = torch.zeros(LEVELS, dtype=torch.float64)
    for indices in chosen.split(LEVEL_BATCH):
        batch, samples = dataset.read(indices.tolist()), to_device(indices, device)
        images = to_device(batch.images, device)
        labels = to_device(batch.labels, device) if recipe.model.num_classes else None
        text = dataset.first_texts(indices) if recipe.model.text_dim else None
        text = None if text is None else text.to(device)
        for level in range(LEVELS):
            noise = normal(seed, "noise", level, samples, tuple(images.shape[1:]))
            t = _times(recipe, seed, level, samples)
            sums[level] += loss_at(model, recipe, images, labels, noise, t, text).diffusion_B.double().sum().cpu()
    return (sums / len(chosen)).tolist()


def _times(recipe: Recipe, seed: int, level: int, samples: Tensor) -> Tensor:
    """Times within a level; for ddpm, whose steps count from data, its steps."""
    t = (level + uniform(seed, "time", level, samples)) / LEVELS
    return ((1 - t) * DDPM_STEPS).long() if recipe.model.process == "ddpm" else t


def quality(study: Study, recipe: Recipe, folder: Path, log: Log) -> dict[str, Any]:
    """FD and KID of generated images; null where the study or the data has none."""
    reference = statistics_for(study, recipe, log)
    if reference is None:
        return {"fd": None, "kid": None, "num_samples": 0}
    sampler = load_sampler(read_source(folder))
    scorer = make_scorer(ReferenceOptions(reference=reference), None, sampler.image_size, folder, log)
    scores = score_model(sampler, scorer, folder / "study-scores.json", log)
    assert scores is not None
    names = ("fid", "kid") if "fid" in scores else ("frechet", "kernel_distance")
    return {"fd": scores[names[0]], "kid": scores[names[1]], "num_samples": scores["num_samples"]}


def statistics_for(study: Study, recipe: Recipe, log: Log) -> Path | None:
    """The statistics that a run's images are compared with; None without scores.

    Unless the study names a file, a classifier of the training images makes those of the held-out images, once for all
    runs of the same data.

    Raises:
        ValueError: the data is too large for a small classifier, or nothing is held out.
    """
    if not study.fields.scores:
        return None
    if study.fields.statistics is not None or not recipe.model.num_classes:
        return study.fields.statistics
    values = json.dumps(dataclasses.asdict(recipe.data), sort_keys=True)
    path = study.fields.output / f"statistics-{derive_seed(0, values) % 16**8:08x}.npz"
    if not path.is_file():
        log("training the classifier whose features score the images")
        options = StatsOptions(path, CLASSIFIER, split="test")
        try:
            make_statistics(study.fields.recipe, recipe.data, options, log)
        except ValueError as error:
            raise ValueError(f"{error}; for a study, give `statistics: FILE` or `scores: false`") from error
    return path
