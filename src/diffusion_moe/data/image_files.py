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
from .image_table import ImageFile, ImageTable, Split
from .listing import hash_names


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Number of the size with the nearest aspect ratio, by the logarithm of width over height; the first of equals."""
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][1] / sizes[number][0]) - ratio))


class ImageFileDataset(ImageDataset):
    """One split of an `ImageTable`.

    An unreadable image ends the run with its name. With on_corrupt skip the next readable image of the split replaces
    it, and `Batch.skipped_names` names it.
    """

    shape_remedy = "set data.channels and data.image_size, or the model's"

    def __init__(self, config: DataConfig, table: ImageTable, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        self.config = config
        self.table = table
        self.background = parse_background(config.background)
        self.class_names = table.class_names
        self.notes = table.notes
        self.selected = table.indices(config.test_fraction, split)
        """Index in the table of each image of the split."""
        self.labels = table.labels[self.selected]
        if config.buckets:
            self.bucket_sizes = config.bucket_sizes
            self.buckets = self._find_buckets()

    def read(self, indices: Sequence[int]) -> Batch:
        if len({self.size_of(index) for index in indices}) > 1:
            raise ValueError("data.buckets makes images of several sizes, which cannot be one batch here; remove it")
        found = [self._readable(index) for index in indices]
        used = [index for index, _ in found]
        skipped = [self.name(index) for index, replacement in zip(indices, used) if replacement != index]
        images = torch.stack([image for _, image in found])
        return Batch(images, torch.from_numpy(self.labels[used]), skipped, indices=used)

    def captions(self, index: int) -> Sequence[str]:
        return () if self.table.captions is None else self.table.captions(int(self.selected[index]))

    def decode(self, index: int, like: int | None = None) -> Tensor | None:
        """One image, CHW, float32, [-1, 1]; None for an unreadable one that may be skipped.

        Args:
            index: the image's.
            like: index of the image whose size it gets; None: its own.
        """
        height, width = self.size_of(index if like is None else like)
        try:
            pixels = decode_pixels(self._file(index).source, height, width, self.config.channels, self.background)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            if self.config.on_corrupt == "skip":
                return None
            raise ValueError(
                f"cannot read image {self.name(index)} ({error}); remove it, or set data.on_corrupt to skip"
            ) from error
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width to which an image is resized and cropped."""
        if self.buckets is None:
            return self.config.image_size, self.config.image_size
        return self.bucket_sizes[int(self.buckets[index])]

    def name(self, index: int) -> str:
        """Path of the image's file, or its row in the data set."""
        return self._file(index).name

    def identity(self) -> str:
        """A hash of the names and classes of all splits' images, in order; the files' contents are not read."""
        return hash_names(self.table.names(), self.table.labels)

    def _readable(self, requested: int) -> tuple[int, Tensor]:
        """Index and pixels of an image, or of the next readable one of the split."""
        for step in range(len(self)):
            index = (requested + step) % len(self)
            image = self.decode(index, like=requested)
            if image is not None:
                return index, image
        raise ValueError(f"no image under data.path {self.config.path} can be read")

    def _file(self, index: int) -> ImageFile:
        return self.table.image(int(self.selected[index]))

    def _find_buckets(self) -> np.ndarray:
        """Bucket of each image, from its header; an unreadable one is put into the first bucket."""
        buckets = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            # Pillow's readers raise almost anything; `decode` names the file.
            with suppress(Exception), open_image(self._file(index).source) as image:
                buckets[index] = nearest_bucket(*upright_size(image), self.bucket_sizes)
        return buckets
