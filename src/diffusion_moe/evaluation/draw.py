"""Sampling a run into files, each with a record of how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluationConfig
from ..run_folder import RunFolder, write_atomically
from .generate import generate, image_grid, provenance, to_uint8
from .score import load_run, origin

GRID_PIXELS = 800
"""Grids of small images are enlarged to about this side."""


def draw_samples(
    run: RunFolder,
    settings: EvaluationConfig,
    classes: Sequence[int] | None,
    per_class: int,
    form: Literal["grid", "png", "npz"],
    output: Path | None,
) -> Path:
    """Draw `per_class` images of each class and write them with a JSON record beside them.

    Returns:
        The file (grid, npz) or folder (png).

    Raises:
        ValueError: a class is out of range, the model is unconditional, or the file's ending is not the form's.
    """
    ending = {"grid": ".png", "npz": ".npz", "png": ""}[form]
    if output is not None and ending and output.suffix != ending:
        raise ValueError(f"output is {output}; a file of format {form} ends in {ending}")
    labels = _labels(classes, per_class, run.read_recipe().model.num_classes)
    model = load_run(run)
    count = per_class if labels is None else len(labels)
    images = generate(model, labels, count, settings)
    path = (
        output or run.samples / f"{form}-{_name(settings, classes, per_class, origin(run)['training_steps'])}{ending}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    if form == "grid":
        canvas = _to_image(image_grid(images, per_class).numpy())
        factor = max(1, GRID_PIXELS // max(canvas.size))
        canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST).save(path)
    elif form == "npz":
        np.savez_compressed(path, images=pixels, labels=np.array([] if labels is None else labels))
    else:
        path.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            prefix = "" if labels is None else f"class{int(labels[i]):04d}-"
            _to_image(image).save(path / f"{prefix}{i:06d}.png")
    record = {"labels": None if labels is None else labels.tolist(), "num_samples": count, **provenance(settings)}
    write_atomically(path.with_name(f"{path.name.removesuffix(ending)}.json"), json.dumps(record | origin(run)) + "\n")
    return path


def _name(settings: EvaluationConfig, classes: Sequence[int] | None, per_class: int, training_steps: int) -> str:
    """A name that other samples do not share; what stands for itself is left out."""
    parts = [f"step{training_steps}", f"seed{settings.seed}", f"{settings.solver}{settings.steps}"]
    parts += [f"guidance{settings.guidance_scale:g}"]
    if settings.guidance_interval != (0.0, 1.0):
        parts += ["from{:g}to{:g}".format(*settings.guidance_interval)]
    if classes is not None:
        parts += ["class" + "+".join(map(str, classes))]
    return "-".join([*parts, f"{per_class}each"])


def _labels(classes: Sequence[int] | None, per_class: int, num_classes: int) -> Tensor | None:
    if num_classes == 0:
        if classes is not None:
            raise ValueError(f"classes is {list(classes)}, but the model is unconditional; leave the option out")
        return None
    chosen = list(range(num_classes)) if classes is None else list(classes)
    for label in chosen:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range; the model has classes 0 to {num_classes - 1}")
    return torch.tensor(chosen).repeat_interleave(per_class)


def _to_image(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)
