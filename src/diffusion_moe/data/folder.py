"""A folder of images, one sub-folder a class, through Hugging Face `datasets`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from .dataset import Batch, ImageDataset, Split, split_indices


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size` pixels, then the central square."""
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder(ImageDataset):
    """Images resized and center-cropped to a square.

    An unreadable file ends the run with its name, or (on_corrupt: skip) the next readable image of the split stands in
    for it and `Batch.skipped` counts it.
    """

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        self.config = config
        assert config.path is not None
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(
                f"data.path {config.path} is not a folder; give one with a sub-folder of images for each class"
            )
        if not any(child.is_dir() for child in folder.iterdir()):
            raise ValueError(f"data.path {config.path} holds no sub-folders; put the images of each class into one")
        self.table, labels, self.class_names = _read_table(folder)
        self.rows = split_indices(labels, config.test_fraction, split)
        self.labels = labels[self.rows]
        if len(self.rows) == 0:
            raise ValueError(f"data.path {config.path} gives no image for the {split} split; see data.test_fraction")

    def read(self, indices: Sequence[int]) -> Batch:
        images, labels, skipped = [], [], 0
        for index in indices:
            place, misses = index, 0
            while (image := self._decode(place)) is None:
                place, misses = (place + 1) % len(self), misses + 1
                if misses == len(self):
                    raise ValueError(f"no image under data.path {self.config.path} can be read")
            images.append(image)
            labels.append(int(self.labels[place]))
            skipped += misses > 0
        return Batch(torch.stack(images), torch.tensor(labels), skipped)

    def _decode(self, index: int) -> Tensor | None:
        """CHW float32 in [-1, 1], or None for an unreadable file that may be skipped."""
        record = self.table[int(self.rows[index])]["image"]
        try:
            with Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])) as image:
                square = resize_and_crop(
                    image.convert("RGB" if self.config.channels == 3 else "L"), self.config.image_size
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.config.on_corrupt == "skip":
                return None
            raise ValueError(
                f"cannot read image {record['path']} ({error}); remove it, or set data.on_corrupt to skip"
            ) from error
        pixels = np.array(square, dtype=np.float32).reshape(square.height, square.width, -1) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _read_table(folder: Path):  # type: ignore[no-untyped-def]  # datasets is untyped
    """File paths by row (nothing decoded yet), labels and class names."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=False)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"data.path {folder} cannot be read as a folder of images: {first_line}") from error
    table = table.cast_column("image", datasets.Image(decode=False))
    return table, np.array(table["label"], dtype=np.int64), list(table.features["label"].names)
