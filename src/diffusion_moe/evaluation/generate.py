"""Images from a model: number i is a function of (seed, i), whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluationConfig
from ..diffusion.guidance import Velocity, guided
from ..diffusion.solvers import EVALUATIONS_PER_STEP, SOLVERS, even_times
from ..models import Backbone
from ..randomness import normal


def class_schedule(num_samples: int, num_classes: int) -> Tensor | None:
    """Classes 0, 1, ... in turn, int64, (S,); None for an unconditional model."""
    return torch.arange(num_samples) % num_classes if num_classes else None


@torch.no_grad()
def generate_batches(
    model: Backbone, labels: Tensor | None, num_samples: int, settings: EvaluationConfig
) -> Iterator[Tensor]:
    """Generate images 0 to num_samples - 1, a batch at a time.

    Args:
        model: in eval mode; its device is used. labels: class of each image, int64, (S,).

    Yields:
        NCHW, float32, [-1, 1] by convention but not clipped, on the CPU.
    """
    config, device = model.settings, model.device
    times = even_times(settings.steps)
    for samples in torch.arange(num_samples).split(settings.batch_size):
        classes = None if labels is None else labels[samples].to(device)

        def conditional(x: Tensor, t: Tensor, classes: Tensor | None = classes) -> Tensor:
            return model(x, t.to(device), classes).sample[:, : config.in_channels]

        def unconditional(x: Tensor, t: Tensor, classes: Tensor | None = classes) -> Tensor:
            assert classes is not None
            return conditional(x, t, torch.full_like(classes, config.num_classes))

        velocity: Velocity = conditional
        if classes is not None:
            velocity = guided(conditional, unconditional, settings.guidance_scale, settings.guidance_interval)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = normal(settings.seed, "sample", 0, samples.to(device), shape)
        yield SOLVERS[settings.solver](velocity, noise, times).float().cpu()


def generate(model: Backbone, labels: Tensor | None, num_samples: int, settings: EvaluationConfig) -> Tensor:
    """All images of `generate_batches` as one tensor."""
    return torch.cat(list(generate_batches(model, labels, num_samples, settings)))


def provenance(settings: EvaluationConfig) -> dict[str, Any]:
    """How the images were made, for every file and number that comes of them."""
    return {
        "solver": settings.solver,
        "steps": settings.steps,
        "function_evaluations": settings.steps * EVALUATIONS_PER_STEP[settings.solver],
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": list(settings.guidance_interval),
        "seed": settings.seed,
    }


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255, NCHW, rounded and clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images in rows of `columns` with a one-pixel gap, uint8 HWC (one or three channels)."""
    pixels = to_uint8(images)
    S, C, H, W = pixels.shape
    rows = math.ceil(S / columns)
    canvas = torch.full((C, rows * (H + 1) + 1, columns * (W + 1) + 1), 96, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (H + 1) + 1, (i % columns) * (W + 1) + 1
        canvas[:, top : top + H, left : left + W] = image
    return canvas.permute(1, 2, 0).contiguous()
