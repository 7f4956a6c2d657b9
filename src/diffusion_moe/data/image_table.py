"""A table of image files with classes and captions: the common form of folders, `datasets` tables and tars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["train", "test"]
"""Training or held-out images."""


class ImageFile(NamedTuple):
    """One image, not decoded."""

    name: str
    """Path, or row in the data set, for messages."""
    source: str | bytes
    """Path of the file, or its content."""


@dataclass(frozen=True)
class ImageTable:
    """Image files of all splits with their metadata."""

    image: Callable[[int], ImageFile]
    """File of an image by its index."""
    names: Callable[[], Iterable[str]]
    """Names of all images, relative to the data set."""
    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    captions: Callable[[int], Sequence[str]] | None = None
    """Captions of an image by its index, if there are any."""
    held_out: np.ndarray | None = None
    """True for images of the held-out split, bool; None if the data does not say."""
    notes: Sequence[str] = ()
    """Lines for the user: splits found, and what is left out."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are left out, by reason."""

    def indices(self, test_fraction: float, split: Split) -> np.ndarray:
        """Indices of one split: as the data says, or else by `split_indices`."""
        if self.held_out is None:
            return split_indices(self.labels, test_fraction, split)
        return np.flatnonzero(self.held_out == (split == "test"))


def split_indices(labels: np.ndarray, test_fraction: float, split: Split) -> np.ndarray:
    """Indices of one split, the same for every seed; `test_fraction` of each class is for testing."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels) if test_fraction else ():
        members = np.flatnonzero(labels == label)
        shuffled = np.random.RandomState(int(label)).permutation(members)
        held_out[shuffled[: round(test_fraction * len(members))]] = True
    return np.flatnonzero(held_out == (split == "test"))


def as_captions(value: Any) -> tuple[str, ...]:
    """Captions from one text or a list of texts.

    Raises:
        ValueError: the value is neither, or the list is empty.
    """
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a text or a list of texts, got {str(value)[:40]!r}")
    return texts
