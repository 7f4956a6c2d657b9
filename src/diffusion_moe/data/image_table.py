"""Image files with their classes and captions: what every reader of data on a disk answers with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class ImageFile(NamedTuple):
    """One image, not decoded."""

    name: str
    """For messages: its path, or its row in the data set."""
    source: str | bytes
    """Path of the file, or its content."""

    def content(self) -> bytes:
        """The bytes of the file."""
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()


class Rows(Protocol):
    """Image files by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> ImageFile: ...

    def names(self) -> Iterator[str]:
        """Name of each image in the data set, wherever that lies."""
        ...


class CaptionColumn(Protocol):
    """Captions by row."""

    def __getitem__(self, row: int, /) -> Sequence[str]: ...


@dataclass(frozen=True)
class Table:
    """Image files with what is known of them."""

    rows: Rows
    labels: np.ndarray
    """Class of each row, int64."""
    class_names: list[str]
    captions: CaptionColumn | None = None
    """Captions of each row, of data that has them."""
    held_out: np.ndarray | None = None
    """Whether each row is of the held-out split, bool; None where the data does not say."""
    notes: Sequence[str] = ()
    """Lines for the user: what was found and what is left out."""
    ignored: Sequence[tuple[str, int]] = ()
    """What is left out: reason and count."""


def as_captions(value: Any) -> tuple[str, ...]:
    """One text or a list of them.

    Raises:
        ValueError: it is neither, or the list is empty.
    """
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a text or a list of texts, got {str(value)[:40]!r}")
    return texts
