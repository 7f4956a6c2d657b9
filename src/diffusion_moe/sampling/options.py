"""Options of `sample`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Weights = str
"""ema: the published weights of a folder; model: those of a run's newest checkpoint, without EMA; or the decay of a
further EMA that the run has kept, as 0.999."""


@dataclass(frozen=True)
class SampleOptions:
    """Images to generate, and how they are saved."""

    classes: str | None = None
    """Names or indices of classes, as "golden retriever,7"; #7 is index 7, name:7 the class named 7. Unless given, all
    classes, or eight of more than twenty."""
    per_class: int = 10
    """Images of each class (of an unconditional model: images)."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture with a row per class, single pictures, or arrays `images` (uint8, NHWC) and `labels`."""
    weights: Weights = "ema"
    """Weights of a run: the EMA (ema), those of its newest checkpoint without EMA (model), or a further EMA
    (training.extra_ema_decays) by its decay, as 0.999."""
    output: Path | None = None
    """File (grid, npz) or folder (png); inside the folder's samples/ unless given."""
    vae: str | None = None
    """Hub id or folder of the AutoencoderKL that decodes latents, if the folder has none."""
    prompt: str | None = None
    """A prompt, for which `per_class` images are generated."""
    prompts: Path | None = None
    """A text file of prompts, one per line."""
    negative_prompt: str | None = None
    """A prompt that guidance leads away from; the model's null prompt unless given."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder, if it was moved since training."""
    height: int | None = None
    """Height of the images in pixels, a multiple of the patch size; the model's own unless given."""
    width: int | None = None
    """Width of the images in pixels, likewise."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class is {self.per_class}; it must be positive")
        for name in ("negative_prompt", "text_encoder"):
            if getattr(self, name) is not None and self.prompt is None and self.prompts is None:
                raise ValueError(f"{name} is {getattr(self, name)}, but there is no prompt; give --prompt or --prompts")

    def chosen(self) -> list[str] | None:
        """The classes one by one."""
        return None if self.classes is None else [part.strip() for part in self.classes.strip("[] ").split(",")]
