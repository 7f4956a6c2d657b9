"""Data sets of labelled images with a fixed split into training and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..randomness import uniform
from .order import Draw

Split = Literal["train", "test"]


class Batch(NamedTuple):
    """Images and what is known of them."""

    images: Tensor
    """NCHW, float32, [-1, 1]."""
    labels: Tensor
    """Classes, int64, (B,)."""
    skipped: int = 0
    """Unreadable images that another one stands in for."""


class ImageDataset(ABC):
    """Labelled images; drawn in batches of `Draw`s, so that augmentation is a function of (seed, epoch, index)."""

    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    """Name of each class."""

    def __init__(self, flip: bool, seed: int) -> None:
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Batch:
        """The images as they are, without augmentation."""

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """A training batch; the name is what torch's DataLoader looks for to fetch a batch at once."""
        batch = self.read([draw.place for draw in draws])
        if not self.flip:
            return batch
        places, epochs = torch.tensor(draws).unbind(1)
        mirrored = uniform(self.seed, "flip", epochs, places) < 0.5
        images = torch.where(mirrored[:, None, None, None], batch.images.flip(-1), batch.images)
        return batch._replace(images=images)

    def everything(self) -> Batch:
        """All images in order."""
        return self.read(range(len(self)))


def split_indices(labels: np.ndarray, test_fraction: float, split: Split) -> np.ndarray:
    """Indices of one split, the same for every seed: of each class, the share `test_fraction` is for testing."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = np.random.RandomState(int(label)).permutation(members)
        chosen[shuffled[: round(test_fraction * len(members))]] = True
    return np.flatnonzero(chosen if split == "test" else ~chosen)


def load_dataset(config: DataConfig, split: Split, seed: int = 0) -> ImageDataset:
    """The data set a recipe names. `seed` is that of the augmentation.

    Raises:
        ValueError: the folder is missing, empty or has no class folders.
    """
    if config.kind == "digits":
        from .digits import Digits

        return Digits(config, split, seed)
    from .folder import ImageFolder

    return ImageFolder(config, split, seed)
