"""Handwritten digits of scikit-learn: 1,797 images of 8 x 8 pixels that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from .dataset import Batch, ImageDataset
from .image_table import Split, split_indices


class Digits(ImageDataset):
    """The digits, with grey levels 0 to 16 scaled to [-1, 1]."""

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        pixels, labels = load_digits()
        selected = split_indices(labels, config.test_fraction, split)
        self.labels = labels[selected]
        self.class_names = [str(name) for name in range(10)]
        self.images = torch.from_numpy(pixels[selected] / 8 - 1).float()[:, None]

    def read(self, indices: Sequence[int]) -> Batch:
        requested = torch.as_tensor(list(indices))
        return Batch(self.images[requested], torch.from_numpy(self.labels)[requested])


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (1797, 8, 8) and labels: `sklearn.datasets.load_digits` without importing scikit-learn and pandas."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    rows = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype("int64")
