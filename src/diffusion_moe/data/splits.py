"""Split of a data set into training and held-out images."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .image_table import ImageTable

Split = Literal["train", "test"]


def split_indices(labels: np.ndarray, test_fraction: float, split: Split) -> np.ndarray:
    """Indices of one split, the same for every seed; `test_fraction` of each class is for testing."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels) if test_fraction else ():
        members = np.flatnonzero(labels == label)
        shuffled = np.random.RandomState(int(label)).permutation(members)
        chosen[shuffled[: round(test_fraction * len(members))]] = True
    return np.flatnonzero(chosen if split == "test" else ~chosen)


def split_table(table: ImageTable, test_fraction: float, split: Split) -> np.ndarray:
    """Indices of one split: as the data says, or else by `split_indices`."""
    if table.held_out is not None:
        return np.flatnonzero(table.held_out == (split == "test"))
    return split_indices(table.labels, test_fraction, split)
