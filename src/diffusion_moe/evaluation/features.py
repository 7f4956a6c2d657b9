"""Feature extractors, and the check that two features are comparable."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import to_device
from ..moe.precision import exact_float32

INCEPTION, CLASSIFIER = "inception", "classifier"
"""Names of extractors that are no `transformers` model."""
HASH_DIGITS = 16


@dataclass(frozen=True)
class ExtractorIdentity:
    """Everything that features depend on: those of different identities do not compare."""

    name: str
    """inception, classifier, or a `transformers` model's hub id or folder."""
    weights: str
    """Start of a SHA-256 over the weights (Inception: of the weight file)."""
    resize: str
    """Resizing of an image before the network sees it."""
    feature: str
    """The layer whose output is taken."""

    @property
    def short_name(self) -> str:
        """The name without the folders or the owner before it."""
        return self.name.rstrip("/").split("/")[-1]

    def check(self, other: ExtractorIdentity, where: str) -> None:
        """Raise a ValueError for features, stored in `where`, that do not compare; the name alone does not matter."""
        mine, theirs = asdict(self), asdict(other)
        for key, what in (("weights", "weights"), ("resize", "resizing"), ("feature", "features")):
            if mine[key] != theirs[key]:
                raise ValueError(
                    f"{where} was made by {other.name} with {what} {theirs[key]}, but the images are read by "
                    f"{self.name} with {what} {mine[key]}; use one extractor for both"
                )


class Extractor(ABC):
    """Images to features; call it under `torch.inference_mode` or not, no gradient is kept."""

    identity: ExtractorIdentity
    channels: int
    """Channels of the images it reads; grey images are repeated where it reads three."""
    module: nn.Module

    def to(self, device: torch.device) -> Extractor:
        """Move to a device; images may come from any."""
        self.module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 NCHW images, float32 on the CPU: `pool` (S, D) and perhaps more.

        Raises:
            ValueError: the images have another number of channels.
        """
        channels = images.shape[1]
        if channels == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        elif channels != self.channels:
            raise ValueError(f"{self.identity.name} reads images of {self.channels} channels; these have {channels}")
        images = images.flatten().view(images.shape)  # kernels are chosen by strides, and differ in the last digit
        # TensorFloat-32 would move the features by more than float32 sums do.
        with exact_float32(convolutions=True):
            features = self.extract(to_device(images, self.device))
        return {name: value.float().cpu() for name, value in features.items()}

    @abstractmethod
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images of the right channels, on the extractor's device."""

    def logits(self, pool_SD: Tensor) -> Tensor | None:
        """Unnormalised log-probabilities of classes from features, (S, C); None for a network without classes."""
        return None

    def warnings(self) -> list[str]:
        """Reasons why scores do not compare with published ones, if any."""
        return []


def digest_of(content: Any) -> str:
    """Start of a SHA-256 over plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def fingerprint(module: nn.Module) -> str:
    """Start of a SHA-256 over names, kinds and values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]
