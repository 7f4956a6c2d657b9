"""A loaded model with all that sampling from it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import EvaluationConfig
from ..log import Log, ProgressLog
from ..models import Backbone
from .acceleration import Network, accelerated
from .generate import PromptRows, SamplingStats, check_solver, generate_batches, sampling_metadata, vae_scale_factor
from .loading import best_device, load_decoder, load_weights, weights_metadata
from .source import Source

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model in eval mode, the VAE that decodes its latents, and how it is sampled.

    `load_sampler` makes one of a folder. To sample a loaded model with other settings, use `dataclasses.replace`.
    """

    source: Source
    """Folder of the model, with its classes, latents and texts."""
    model: Backbone
    settings: EvaluationConfig
    vae: AutoencoderKL | None = None
    weights_metadata: dict[str, Any] = field(default_factory=dict)
    """See `loading.weights_metadata`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        side = self.source.config.sample_size * vae_scale_factor(self.vae)
        return side, side

    def size_for(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """Height and width in the model's space for an image's in pixels; None: the model's own.

        Raises:
            ValueError: the patches do not fill them.
        """
        if height is None and width is None:
            return None
        factor = vae_scale_factor(self.vae)
        multiple = factor * self.source.config.patch_size
        sides = [own if side is None else side for side, own in zip((height, width), self.image_size)]
        for name, side in zip(("height", "width"), sides):
            if side < multiple or side % multiple:
                raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple}")
        return sides[0] // factor, sides[1] // factor

    def batches(
        self,
        count: int,
        labels: Tensor | None = None,
        prompts: PromptRows | None = None,
        *,
        first: int = 0,
        size: tuple[int, int] | None = None,
        stats: SamplingStats | None = None,
    ) -> Iterator[Tensor]:
        """Images `first` to count - 1, a batch at a time; see `generate_batches`."""
        call = (self.model, labels, count, self.settings, self.vae, stats, first)
        return generate_batches(*call, prompts=prompts, size=size, network=self._network)

    def images(self, count: int, labels: Tensor | None = None, prompts: PromptRows | None = None) -> Tensor:
        """All images of `batches` as one tensor."""
        return torch.cat(list(self.batches(count, labels, prompts)))

    def metadata(self, stats: SamplingStats) -> dict[str, Any]:
        """Settings and cost of sampling, and the weights; for every file made of the images."""
        chosen = {"weights": self.source.weights}
        return sampling_metadata(self.settings, stats) | chosen | self.weights_metadata

    @cached_property
    def _network(self) -> Network:
        """Made once, so that a CUDA graph is captured once for each shape."""
        return accelerated(self.model, self.settings)


def load_sampler(source: Source, settings: EvaluationConfig | None = None, without_vae: Log | None = None) -> Sampler:
    """Check that model and settings (None: the source's) fit, then load the weights and the VAE.

    Args:
        without_vae: called with the reason if the VAE cannot be loaded; latents are then not decoded. None: an error.

    Raises:
        ValueError: solver or guidance do not fit the model, latents lack a VAE, or weights are missing or damaged.
    """
    settings = settings or source.settings
    check_solver(source.config, settings)
    if without_vae is None:
        source.check_images()
    metadata, device = weights_metadata(source), best_device()
    model, vae = load_weights(source).to(device), None
    try:
        vae = load_decoder(source)
    except ValueError as error:
        if without_vae is None:
            raise
        without_vae(str(error))
    return Sampler(source, model, settings, None if vae is None else vae.to(device), metadata)


def with_progress(batches: Iterator[Tensor], count: int, log: Log, verb: str) -> Iterator[Tensor]:
    """The same batches of `count` images, with lines of progress that begin with a verb, such as "sampled"."""
    progress, done = ProgressLog(count, log, verb=f"{verb} "), 0
    for batch in batches:
        yield batch
        done += len(batch)
        progress.update(done)
