"""Sampling into files, each with a record of how it was made."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluationConfig
from ..log import Log
from ..models.labels import by_name, class_number
from ..pixels import image_grid, to_uint8
from ..run_folder import write_atomically
from .generate import SamplingStats, check_solver, generate_batches, provenance
from .options import Weights
from .prompts import PromptRequest, model_size
from .source import Source

MANY_CLASSES, A_FEW = 20, 8
"""Of more classes than the first number, samples show as many as the second unless told otherwise."""
GRID_PIXELS = 800
"""Grids of small images are enlarged to about this side."""


def generate_images(
    source: Source,
    settings: EvaluationConfig,
    classes: Sequence[str] | None,
    per_class: int,
    form: Literal["grid", "png", "npz"],
    output: Path | None,
    log: Log = print,
    asked: PromptRequest | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> Path:
    """Draw `per_class` images of each class and write them with a JSON record beside them.

    Args:
        classes: names or numbers; None: all of them, or a few of many. log: receives a line of progress now and then.
        asked: prompts, of each of which there are `per_class` images, for a model with text.
        size: height and width of the images in pixels; None: the model's own.

    Returns:
        The file (grid, npz) or folder (png).

    Raises:
        ValueError: a class is unknown, the model is unconditional, solver or output do not fit, or latents lack a VAE.
    """
    ending = {"grid": ".png", "npz": ".npz", "png": ""}[form]
    if output is not None and ending and output.suffix != ending:
        raise ValueError(f"output is {output}; a file of format {form} ends in {ending}")
    check_solver(source.config, settings)
    source.check_images()
    if (asked is None) == bool(source.config.text_dim):
        what = "takes text; give --prompt or --prompts" if asked is None else "takes no text; leave prompts out"
        raise ValueError(f"the model of {source.path} {what}")
    if asked is not None and source.config.num_classes:
        raise ValueError(f"the model of {source.path} takes classes and text, which only its forward can be given")
    numbers = class_numbers(classes, source)
    labels = None if numbers is None else torch.tensor(numbers).repeat_interleave(per_class)
    model, vae = source.load()
    inner = model_size(size, model.settings, vae)
    prompts = None if asked is None else asked.encoded(source, per_class, log)
    count, usage, origin = per_class if labels is None else len(labels), SamplingStats(), source.origin()
    count = count if asked is None else per_class * len(asked.prompts)
    batches, spoke = [], time.monotonic()
    for batch in generate_batches(model, labels, count, settings, vae, usage, prompts=prompts, size=inner):
        batches.append(batch)
        done = sum(map(len, batches))
        if time.monotonic() - spoke > 10 and done < count:
            log(f"drew {done} of {count} images")
            spoke = time.monotonic()
    images = torch.cat(batches)
    made_by = [*weights_name(source.weights), settings_name(settings, origin.get("training_steps"))]
    name = _name(made_by, numbers if classes else None, per_class)
    name += "" if inner is None else f"-{images.shape[-2]}x{images.shape[-1]}"
    name += "" if asked is None else f"-{asked.name()}"
    path = output or source.samples / f"{form}-{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(images, labels, per_class, form, path, asked)
    record = {"labels": None if labels is None else labels.tolist(), "num_samples": count}
    record |= {"size": list(images.shape[-2:])} | ({} if asked is None else asked.record(per_class))
    record |= provenance(settings, usage) | {"weights": source.weights} | origin
    write_atomically(path.with_name(f"{path.name.removesuffix(ending)}.json"), json.dumps(record) + "\n")
    return path


def _write(
    images: Tensor,
    labels: Tensor | None,
    per_class: int,
    form: Literal["grid", "png", "npz"],
    path: Path,
    asked: PromptRequest | None = None,
) -> None:
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    if form == "grid":
        canvas = _to_image(image_grid(images, per_class).numpy())
        factor = max(1, GRID_PIXELS // max(canvas.size))
        canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST).save(path)
    elif form == "npz":
        texts: dict[str, Any] = {} if asked is None else {"prompts": np.array(asked.prompts).repeat(per_class)}
        np.savez_compressed(path, images=pixels, labels=np.array([] if labels is None else labels), **texts)
    else:
        path.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            prefix = "" if labels is None else f"class{int(labels[i]):04d}-"
            prefix = prefix if asked is None else f"prompt{i // per_class:04d}-"
            _to_image(image).save(path / f"{prefix}{i:06d}.png")


def _name(made_by: Sequence[str], classes: Sequence[int] | None, per_class: int) -> str:
    """A name that other samples do not share."""
    parts = [] if classes is None else ["class" + "+".join(map(str, classes))]
    return "-".join([*made_by, *parts, f"{per_class}each"])


def weights_name(weights: Weights) -> list[str]:
    """What tells weights apart in names of files; nothing for the published ones."""
    return {"ema": [], "model": ["model"]}.get(weights, [f"ema{weights}"])


def settings_name(settings: EvaluationConfig, training_steps: int | None) -> str:
    """A name that tells settings apart; what stands for itself is left out."""
    usual = EvaluationConfig()
    steps = "" if settings.solver == "dopri5" else settings.steps
    parts = [] if training_steps is None else [f"step{training_steps}"]
    parts += [f"seed{settings.seed}", f"{settings.solver}{steps}", f"guidance{settings.guidance_scale:g}"]
    if settings.guidance_interval != usual.guidance_interval:
        parts += ["from{:g}to{:g}".format(*settings.guidance_interval)]
    if settings.solver == "dopri5":
        parts += [f"rtol{settings.rtol:g}", f"atol{settings.atol:g}"]
    if settings.guidance_channels is not None:
        parts += [f"channels{settings.guidance_channels}"]
    if settings.threshold_scale != usual.threshold_scale:
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
            raise ValueError(f"classes is {','.join(classes)}, but the model is unconditional; leave the option out")
        return None
    if classes is None:
        return list(range(count)) if count <= MANY_CLASSES else [i * count // A_FEW for i in range(A_FEW)]
    known = by_name(dict(enumerate(source.class_names)))
    return [class_number(text, known, count) for text in classes]


def _to_image(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)
