"""Images that Hugging Face `datasets` reads, from folders, files or the hub, made square."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from .dataset import Batch, ImageDataset, Split, split_indices


class CaptionColumn(Protocol):
    """Captions by row."""

    def __getitem__(self, row: int, /) -> Sequence[str]: ...


class Table(NamedTuple):
    """Undecoded images with their classes."""

    rows: Any
    """A `datasets.Dataset` with the one column `image`: records of `path` and `bytes`; or `TarRows`."""
    labels: np.ndarray
    """Class of each row, int64."""
    class_names: list[str]
    captions: CaptionColumn | None = None
    """Captions of each row, of data that has them."""


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size` pixels, then the central square.

    As ADM (arXiv 2105.05233) prepares the images that published scores compare with: halve by averages while at least
    twice too large, then bicubic.
    """
    return cover_and_crop(image, size, size)


def cover_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """As small as covers the size, then its centre."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """The size of the nearest aspect ratio, by the logarithm of width over height; the first of equals."""
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][1] / sizes[number][0]) - ratio))


class TableImages(ImageDataset):
    """The images of a `Table`, resized and center-cropped to a square.

    An unreadable image ends the run with its name, or (on_corrupt: skip) the next readable image of the split stands in
    for it and `Batch.skipped_names` names it.
    """

    shape_remedy = "set data.channels and data.image_size, or the model's"

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        self.config = config
        self.table = _read(config)
        self.class_names = self.table.class_names
        self.rows = split_indices(self.table.labels, config.test_fraction, split)
        self.labels = self.table.labels[self.rows]
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
            like: the image whose size it gets; None: its own.
        """
        try:
            record = self._record(index)
            if record is None:
                raise ValueError("there is none")
            with Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
                square = cover_and_crop(
                    image.convert("RGB" if self.config.channels == 3 else "L"),
                    *self.size_of(index if like is None else like),
                )
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            if self.config.on_corrupt == "skip":
                return None
            raise ValueError(
                f"cannot read image {self.name(index)} ({error}); remove it, or set data.on_corrupt to skip"
            ) from error
        pixels = np.array(square, dtype=np.float32).reshape(square.height, square.width, -1) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that an image is made."""
        if self.buckets is None:
            return self.config.image_size, self.config.image_size
        return self.bucket_sizes[int(self.buckets[index])]

    def _find_buckets(self) -> np.ndarray:
        """From the images' headers; an unreadable one counts as of the first bucket."""
        found = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            with suppress(Exception):  # Pillow's readers raise almost anything; `decode` tells of them
                record = self._record(index) or {"path": None, "bytes": b""}
                with Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
                    found[index] = nearest_bucket(image.height, image.width, self.bucket_sizes)
        return found

    def name(self, index: int) -> str:
        """Its file, or its row in the data set."""
        record = self._record(index) or {"path": None, "bytes": b""}
        if record["bytes"] is None:
            return str(record["path"])
        inner = f" ({record['path']})" if record["path"] else ""
        return f"row {int(self.rows[index])} of {self.config.path}{inner}"

    def identity(self) -> str:
        """A hash of the images' names and classes, in order; it does not see what is in a file."""
        folder = f"{Path(str(self.config.path)).absolute()}/"
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        if not hasattr(self.table.rows, "data"):  # tars
            for row in range(len(self.table.rows)):
                digest.update(f"{self.table.rows.name(row)}\n".encode())
            return digest.hexdigest()
        for chunk in self.table.rows.data["image"].chunks:
            for name in chunk.field("path").to_pylist():
                digest.update(f"{(name or '').removeprefix(folder)}\n".encode())
        return digest.hexdigest()

    def _record(self, index: int) -> dict[str, Any] | None:
        return self.table.rows[int(self.rows[index])]["image"]


def _read(config: DataConfig) -> Table:
    if config.kind == "folder":
        from .folder import read_captioned_folder, read_folder

        assert config.path is not None
        if config.caption_column is not None:
            return read_captioned_folder(Path(config.path), config.caption_column)
        return read_folder(Path(config.path))
    if config.kind == "webdataset":
        from .webdataset import read_webdataset

        assert config.path is not None
        return read_webdataset(Path(config.path), config.caption_column)
    from .huggingface import read_huggingface

    return read_huggingface(config)
