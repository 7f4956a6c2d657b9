"""Extractors by name."""

from __future__ import annotations

from pathlib import Path

from ..sampling.loading import best_device
from .classifier import ClassifierFeatures
from .features import CLASSIFIER, INCEPTION, Extractor
from .inception import Inception
from .reference import Reference
from .vision import VisionModel


def make_extractor(name: str, inception: Path | None = None, reference: Reference | None = None) -> Extractor:
    """An extractor by name, on the best device.

    Args:
        inception: Inception's weight file.
        reference: statistics that hold the classifier.

    Raises:
        ValueError: there is none of that name, or its weights cannot be read.
    """
    if inception is not None and name != INCEPTION:
        raise ValueError(f"--inception is {inception}, but the extractor is {name}; remove the option")
    if name == INCEPTION:
        return Inception(inception).to(best_device())
    if name != CLASSIFIER:
        return VisionModel(name).to(best_device())
    if reference is None or not reference.classifier:
        raise ValueError(
            "a classifier is stored in the statistics that it made; give --reference FILE of "
            "`diffusion-moe stats DATA --extractor classifier`"
        )
    return ClassifierFeatures.of_weights(reference.classifier).to(best_device())
