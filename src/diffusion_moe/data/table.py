"""Data sets of image files: decoded, resized and cropped to one size, or to the nearest of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from .dataset import Batch, ImageDataset
from .decoding import decode_pixels, open_image, parse_background, upright_size
from .image_table import Table
from .listing import hash_names
from .splits import Split, split_rows


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """The size of the nearest aspect ratio, by the logarithm of width over height; the first of equals."""
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][1] / sizes[number][0]) - ratio))


class TableImages(ImageDataset):
    """One split of a `Table`.

    An unreadable image ends the run with its name, or (on_corrupt: skip) the next readable image of the split stands in
    for it and `Batch.skipped_names` names it.
    """

    shape_remedy = "set data.channels and data.image_size, or the model's"

    def __init__(self, config: DataConfig, table: Table, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        self.config, self.table = config, table
        self.background = parse_background(config.background)
        self.class_names, self.notes = table.class_names, table.notes
        self.rows = split_rows(table, config.test_fraction, split)
        self.labels = table.labels[self.rows]
        if len(self.rows) == 0:
            raise ValueError(f"data.path {config.path} gives no image for the {split} split; see data.test_fraction")
        if config.buckets:
            self.bucket_sizes = config.bucket_sizes
            self.buckets = self._find_buckets()

    def read(self, indices: Sequence[int]) -> Batch:
        if len({self.size_of(index) for index in indices}) > 1:
            raise ValueError("data.buckets makes images of several sizes, which cannot be one batch here; leave it out")
        images, labels, skipped, sources = [], [], [], []
        for index in indices:
            found, misses = index, 0
            while (image := self.decode(found, like=index)) is None:
                found, misses = (found + 1) % len(self), misses + 1
                if misses == len(self):
                    raise ValueError(f"no image under data.path {self.config.path} can be read")
            images.append(image)
            labels.append(int(self.labels[found]))
            sources.append(found)
            if misses:
                skipped.append(self.name(index))
        return Batch(torch.stack(images), torch.tensor(labels), skipped, found=sources)

    def captions(self, index: int) -> Sequence[str]:
        return () if self.table.captions is None else self.table.captions[int(self.rows[index])]

    def decode(self, index: int, like: int | None = None) -> Tensor | None:
        """One image, CHW, float32, [-1, 1]; None for an unreadable one that may be skipped.

        Args:
            index: of the image.
            like: the image whose size it gets; None: its own.
        """
        try:
            pixels = self.pixels(index, like)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            if self.config.on_corrupt == "skip":
                return None
            raise ValueError(
                f"cannot read image {self.name(index)} ({error}); remove it, or set data.on_corrupt to skip"
            ) from error
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()

    def pixels(self, index: int, like: int | None = None) -> np.ndarray:
        """One image, HWC, uint8; arguments as for `decode`. A damaged file raises almost anything."""
        source = self.table.rows[int(self.rows[index])].source
        size = self.size_of(index if like is None else like)
        return decode_pixels(source, *size, self.config.channels, self.background)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that an image is made."""
        if self.buckets is None:
            return self.config.image_size, self.config.image_size
        return self.bucket_sizes[int(self.buckets[index])]

    def _find_buckets(self) -> np.ndarray:
        """From the images' headers; an unreadable one counts as of the first bucket."""
        found = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            with (
                suppress(Exception),  # Pillow's readers raise almost anything; `decode` names the file
                open_image(self.table.rows[int(self.rows[index])].source) as image,
            ):
                found[index] = nearest_bucket(*upright_size(image), self.bucket_sizes)
        return found

    def name(self, index: int) -> str:
        """The image's file, or its row in the data set."""
        return self.table.rows[int(self.rows[index])].name

    def identity(self) -> str:
        """A hash of the names and classes of all splits' images, in order; it does not see what is in a file."""
        return hash_names(self.table.rows.names(), self.table.labels)
