"""Images in files, each with JSON metadata of how they were sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluationConfig
from ..log import Log
from ..models.labels import by_name, class_number
from ..pixels import image_grid, to_image, to_uint8
from ..run_folder import write_atomically
from .generate import SamplingStats
from .options import ENDINGS, SampleOptions, Weights
from .prompts import encode_prompts, requested_prompts
from .sampler import Sampler, load_sampler, with_progress
from .source import Source

MANY_CLASSES, A_FEW = 20, 8
"""Numbers of classes: of more than the first, as many as the second are sampled, unless options say otherwise."""
GRID_PIXELS = 800
"""Grids of small images are enlarged to about this side."""


def generate_images(source: Source, settings: EvaluationConfig, options: SampleOptions, log: Log = print) -> Path:
    """Sample images and write them, with JSON metadata beside them.

    Returns:
        The file (grid, npz) or folder (png).

    Raises:
        ValueError: classes, prompts, size or settings do not fit the model, or it cannot be loaded.
    """
    classes, each = class_numbers(options.class_list(), source), options.per_class
    texts = requested_prompts(options, source)
    sampler = load_sampler(source, settings)
    size = sampler.size_for(options.height, options.width)
    labels = None if classes is None else torch.tensor(classes).repeat_interleave(each)
    prompts = encode_prompts(texts, options, source, log) if texts else None
    # An unconditional model has one row of images.
    count, stats = each * len(texts or classes or [None]), SamplingStats()
    batches = sampler.batches(count, labels, prompts, size=size, stats=stats)
    images = torch.cat(list(with_progress(batches, count, log, "sampled")))
    ending = ENDINGS[options.format]
    name = _name(sampler, options, classes, texts, None if size is None else images.shape[-2:])
    path = options.output or source.path / "samples" / f"{options.format}-{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(images, labels, texts, options, path)
    metadata: dict[str, Any] = {"labels": None if labels is None else labels.tolist(), "num_samples": count}
    metadata["size"] = list(images.shape[-2:])
    if texts:
        metadata |= {"prompts": texts, "per_prompt": each, "negative_prompt": options.negative_prompt}
    metadata |= sampler.metadata(stats)
    write_atomically(path.with_name(f"{path.name.removesuffix(ending)}.json"), json.dumps(metadata) + "\n")
    return path


def _write(images: Tensor, labels: Tensor | None, texts: Sequence[str], options: SampleOptions, path: Path) -> None:
    pixels, each = to_uint8(images).permute(0, 2, 3, 1), options.per_class
    if options.format == "grid":
        canvas = to_image(image_grid(images, each))
        factor = max(1, GRID_PIXELS // max(canvas.size))
        canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST).save(path)
    elif options.format == "npz":
        prompts: dict[str, Any] = {"prompts": np.array(texts).repeat(each)} if texts else {}
        np.savez_compressed(path, images=pixels.numpy(), labels=np.array([] if labels is None else labels), **prompts)
    else:
        path.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            prefix = "" if labels is None else f"class{int(labels[i]):04d}-"
            prefix = f"prompt{i // each:04d}-" if texts else prefix
            to_image(image).save(path / f"{prefix}{i:06d}.png")


def _name(
    sampler: Sampler,
    options: SampleOptions,
    classes: Sequence[int] | None,
    texts: Sequence[str],
    size: Sequence[int] | None,
) -> str:
    """A name that other samples do not share."""
    parts = [*weights_name(sampler.source.weights), settings_name(sampler)]
    if options.classes is not None and classes is not None:
        parts += ["class" + "+".join(map(str, classes))]
    parts += [f"{options.per_class}each"]
    if size is not None:
        parts += [f"{size[0]}x{size[1]}"]
    if texts:
        text = "\n".join((*texts, repr(options.negative_prompt)))
        parts += [f"prompts{hashlib.sha256(text.encode()).hexdigest()[:8]}"]
    return "-".join(parts)


def weights_name(weights: Weights) -> list[str]:
    """A part of a file's name that distinguishes weights; none for the published ones."""
    return {"ema": [], "model": ["model"]}.get(weights, [f"ema{weights}"])


def settings_name(sampler: Sampler) -> str:
    """A part of a file's name that distinguishes settings and training steps; most defaults are left out."""
    settings, default = sampler.settings, EvaluationConfig()
    training_steps = sampler.weights_metadata.get("training_steps")
    steps = "" if settings.solver == "dopri5" else settings.steps
    parts = [] if training_steps is None else [f"step{training_steps}"]
    parts += [f"seed{settings.seed}", f"{settings.solver}{steps}", f"guidance{settings.guidance_scale:g}"]
    if settings.guidance_interval != default.guidance_interval:
        parts += ["from{:g}to{:g}".format(*settings.guidance_interval)]
    if settings.solver == "dopri5":
        parts += [f"rtol{settings.rtol:g}", f"atol{settings.atol:g}"]
    if settings.guidance_channels is not None:
        parts += [f"channels{settings.guidance_channels}"]
    if settings.path_drop_guidance:
        parts += ["pathdrop"]
    if settings.threshold_scale != default.threshold_scale:
        parts += [f"thresholds{settings.threshold_scale:g}"]
    if settings.capacity_limit is not None:
        parts += [f"limit{settings.capacity_limit:g}"]
    if settings.precision == "bf16":
        parts += ["bf16"]
    return "-".join(parts)


def class_numbers(classes: Sequence[str] | None, source: Source) -> list[int] | None:
    """Classes by name or number (see `models.labels`) as numbers; None for an unconditional model.

    Raises:
        ValueError: a class is unknown or ambiguous, or the model is unconditional.
    """
    count = source.config.num_classes
    if count == 0:
        if classes is not None:
            raise ValueError(f"classes is {','.join(classes)}, but the model is unconditional; remove the option")
        return None
    if classes is None:
        return list(range(count)) if count <= MANY_CLASSES else [i * count // A_FEW for i in range(A_FEW)]
    known = by_name(dict(enumerate(source.class_names)))
    return [class_number(text, known, count) for text in classes]
