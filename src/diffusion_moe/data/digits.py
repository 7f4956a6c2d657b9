"""Handwritten digits of scikit-learn: 1,797 images of 8 x 8 pixels that come with the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits

from ..config import DataConfig
from .dataset import Batch, ImageDataset
from .splits import Split, split_indices


class Digits(ImageDataset):
    """The digits, with grey levels 0 to 16 scaled to [-1, 1]."""

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        digits = load_digits()
        selected = split_indices(digits.target, config.test_fraction, split)
        self.labels = digits.target[selected].astype("int64")
        self.class_names = [str(name) for name in digits.target_names]
        self.images = torch.from_numpy(digits.images[selected] / 8 - 1).float()[:, None]

    def read(self, indices: Sequence[int]) -> Batch:
        requested = torch.as_tensor(list(indices))
        return Batch(self.images[requested], torch.from_numpy(self.labels)[requested])
