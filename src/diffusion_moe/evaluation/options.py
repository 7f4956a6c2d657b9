"""Options of `evaluate`, `stats` and `sweep`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import require
from ..sampling.options import WeightsOptions

Split = Literal["train", "test"]
REFERENCE_FEATURES = 10_000
"""Number of images in ADM's reference batches."""


@dataclass(frozen=True)
class ReferenceOptions:
    """Statistics of real images to compare with, and the features."""

    reference: Path | None = None
    """Statistics of real images: a file of `diffusion-moe stats`, ADM's reference batch, or another .npz with mu and
    sigma of Inception. For a run it is optional: without it a small classifier of its own data scores the images, and
    coloured shapes are scored by what the images show."""
    extractor: str | None = None
    """inception, classifier, or the hub id or folder of a transformers vision model such as facebook/dinov2-large; the
    one that made the reference unless given."""
    inception: Path | None = None
    """torch-fidelity's weights of Inception, weights-inception-2015-12-05-6726825d.pth; downloaded unless given."""


@dataclass(frozen=True)
class TextOptions:
    """Prompts, for a model with text."""

    prompts: Path | None = None
    """A text file of prompts, a line each, used in turn; unless given, the first captions of a run's held-out images,
    or for coloured shapes questions of every category."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder, if it is not where training left it."""


@dataclass(frozen=True)
class EvaluateOptions(WeightsOptions, TextOptions, ReferenceOptions):
    """Scores of a model's images."""

    output: Path | None = None
    """The JSON file of the scores; in the folder, under a name that distinguishes settings, unless given."""


@dataclass(frozen=True)
class ImagesOptions(ReferenceOptions):
    """Scores of images from a folder or an .npz."""

    output: Path | None = None
    """The JSON file of the scores; beside the images unless given."""
    num_samples: int | None = None
    """The first so many images; all unless given."""
    batch_size: int = 50
    """Images at a time."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be positive")


@dataclass(frozen=True)
class StatsOptions:
    """Statistics to make, and their images."""

    output: Path | None = None
    """The .npz file; named after data, size and extractor unless given."""
    extractor: str = "inception"
    """inception, the hub id or folder of a transformers vision model, or classifier: a small one trained on the data's
    training split, kept in the file."""
    inception: Path | None = None
    """Weight file of torch-fidelity's Inception; downloaded unless given."""
    split: Split = "train"
    """Split of a recipe's data."""
    image_size: int | None = None
    """Resize the shorter side to this and crop the square (image files of a folder; a recipe has data.image_size)."""
    num_features: int = REFERENCE_FEATURES
    """Images, evenly spread, whose features are kept for KID, precision and recall."""
    batch_size: int = 50
    """Images at a time."""

    def __post_init__(self) -> None:
        for name in ("num_features", "batch_size"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        require(self.image_size is None or self.image_size > 0, f"image_size is {self.image_size}; it must be positive")


@dataclass(frozen=True)
class SweepOptions(TextOptions, ReferenceOptions):
    """The settings that a sweep combines: each one value or a comma list."""

    grid: Path | None = None
    """A YAML file with lists, and other settings, under the names of these options; options win over it."""
    guidance_scale: str | None = None
    """Classifier-free guidance, as 1,1.5,2."""
    guidance_interval: str | None = None
    """Pairs of times between which guidance is on, as 0:1,0.1:1."""
    weights: str | None = None
    """As ema,0.999,std0.1,model: EMA weights, a further EMA by its decay or width, or the weights of a run's newest
    checkpoint without EMA."""
    steps: str | None = None
    """Solver steps, as 25,50."""
    solver: str | None = None
    """As euler,heun."""
    threshold_scale: str | None = None
    """Factors on the thresholds (router: diffmoe, race, threshold), as 0.9,1,1.1."""
    vae: str | None = None
    """Hub id or folder of the AutoencoderKL that decodes latents, where the folder has none of its own."""
    output: Path | None = None
    """Folder of the scores, the table and the figures; sweep/ in the folder unless given."""
