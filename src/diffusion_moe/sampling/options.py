"""Options of `sample`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import require

Weights = str
"""ema: as the folder publishes them; model: of a run's newest checkpoint, without EMA; or a further EMA of the run, by
its decay as 0.999, or by its width as std0.1."""
ENDINGS = {"grid": ".png", "npz": ".npz", "png": ""}
"""Ending of the file or folder (png) that each format is written to."""


@dataclass(frozen=True)
class WeightsOptions:
    """Weights and decoder of a folder."""

    weights: Weights = "ema"
    """A run's EMA weights (ema), those of its newest checkpoint without EMA (model), or a further EMA
    (training.extra_ema_decays) by its decay, as 0.999, or one that `diffusion-moe ema` made by its width, as std0.1."""
    vae: str | None = None
    """Hub id or folder of the AutoencoderKL that decodes latents, where the folder has none of its own."""


@dataclass(frozen=True)
class SampleOptions(WeightsOptions):
    """Images to sample, and their files."""

    classes: str | None = None
    """Names or numbers of classes, as "golden retriever,7"; #7 is number 7, name:7 the class named 7. All unless given,
    or eight of more than twenty."""
    per_class: int = 10
    """Images of each class (of an unconditional model: images)."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One image with a row a class, single images, or arrays `images` (uint8, NHWC) and `labels`."""
    output: Path | None = None
    """File (grid, npz) or folder (png); inside the folder's samples/ unless given."""
    prompt: str | None = None
    """A text to generate `per_class` images of."""
    prompts: Path | None = None
    """A text file of prompts, a line each."""
    negative_prompt: str | None = None
    """A text that guidance leads away from; the model's null prompt unless given."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder, if it is not where training left it."""
    height: int | None = None
    """Height of the images in pixels, any that patches fill; the model's own unless given."""
    width: int | None = None
    """Width of the images in pixels; likewise."""

    def __post_init__(self) -> None:
        require(self.per_class > 0, f"per_class is {self.per_class}; it must be positive")
        for name in ("negative_prompt", "text_encoder"):
            value, given = getattr(self, name), self.prompt is not None or self.prompts is not None
            require(value is None or given, f"{name} is {value}, but there is no prompt; give --prompt or --prompts")
        ending, output = ENDINGS[self.format], self.output
        fits = output is None or not ending or output.suffix == ending
        require(fits, f"output is {output}; a file of format {self.format} ends in {ending}")

    def class_list(self) -> list[str] | None:
        """The classes one by one."""
        return None if self.classes is None else [part.strip() for part in self.classes.strip("[] ").split(",")]
