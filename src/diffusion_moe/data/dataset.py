"""Data sets of labelled images or latents with a fixed split into training and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..randomness import uniform
from ..text import TextFeatures
from .captions import CaptionFeatures
from .order import Draw


class Batch(NamedTuple):
    """Images and what is known of them."""

    images: Tensor
    """NCHW, float32: images in [-1, 1], or latents as the model sees them."""
    labels: Tensor
    """Classes, int64, (B,)."""
    skipped_names: Sequence[str] = ()
    """Unreadable images that another one stands in for, by name."""
    places: Tensor | None = None
    """Place of each image in the step's global batch, int64, (B,); None outside of training."""
    found: Sequence[int] | None = None
    """Index of each image in the data set, where others stand in for unreadable ones; None: as asked for."""
    text: TextFeatures | None = None
    """Features of a caption of each image, of data with captions that are encoded."""

    @property
    def skipped(self) -> int:
        """Number of unreadable images that another one stands in for."""
        return len(self.skipped_names)


class ImageDataset(ABC):
    """Labelled images; drawn in batches of `Draw`s, so that augmentation is a function of (seed, epoch, index)."""

    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    """Name of each class."""
    texts: CaptionFeatures | None = None
    """Features of the captions, where they are encoded."""
    buckets: np.ndarray | None = None
    """Bucket of each image, int64, of data with images of several sizes; a batch is of one bucket."""
    bucket_sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of each bucket."""
    notes: Sequence[str] = ()
    """Lines for the user: how the data is split, and what is left out."""
    shape_remedy = "change the model's, or take other data"
    """What to do where the images' shape is not the model's."""

    def __init__(self, flip: bool, seed: int) -> None:
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Batch:
        """The images as they are, without augmentation."""

    def draw(self, indices: Tensor, epochs: Tensor) -> Batch:
        """Images with the augmentation of their epochs; both int64, (B,)."""
        batch = self.read(indices.tolist())
        mirrored = self.mirrored(indices, epochs)
        return batch._replace(images=torch.where(mirrored[:, None, None, None], batch.images.flip(-1), batch.images))

    def mirrored(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """Which images their epochs mirror left to right, bool, (B,)."""
        if not self.flip:
            return torch.zeros_like(indices, dtype=torch.bool)
        return uniform(self.seed, "flip", epochs, indices) < 0.5

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """A training batch; the name is what torch's DataLoader looks for to fetch a batch at once."""
        indices, epochs, places = torch.tensor(draws).unbind(1)
        batch = self.draw(indices, epochs)
        if self.texts is None:
            return batch._replace(places=places)
        shown = indices if batch.found is None else torch.tensor(batch.found)
        return batch._replace(places=places, text=self.texts.draw(self.seed, shown, epochs))

    def captions(self, index: int) -> Sequence[str]:
        """The captions of an image; empty without any."""
        return ()

    def first_texts(self, indices: Tensor) -> TextFeatures | None:
        """Features of each image's first caption, as evaluation takes it; None without captions."""
        return None if self.texts is None else self.texts.take(indices, torch.zeros_like(indices))

    def everything(self) -> Batch:
        """All images in order."""
        return self.read(range(len(self)))

    def identity(self) -> str | None:
        """A hash of which images there are, in order; None of data that never changes."""
        return None

    def record(self) -> dict[str, Any]:
        """What a model trained on this should remember, as plain values."""
        text = {} if self.texts is None else {"text": self.texts.space.to_dict()}
        return {"class_names": self.class_names} | text
