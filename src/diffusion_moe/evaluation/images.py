"""Numbered images of a folder, an `.npz`, a data set or a model, read a range at a time."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.decoding import cover_and_crop, decode_image
from ..data.listing import list_images, printable
from ..pixels import to_uint8
from ..sampling.generate import SamplingStats, class_schedule
from ..sampling.sampler import Sampler
from .features import HASH_DIGITS, fingerprint
from .prompts import PromptSource

ARRAYS = ("arr_0", "images")
"""Names that images have in an `.npz`: ADM's and ours."""


class Images(ABC):
    """Numbered images of one size."""

    name: str
    """Name for messages and records."""
    count: int
    size: tuple[int, int]
    """Height and width in pixels."""
    notes: Sequence[str] = ()
    """Lines for the user: files that are read, and those that are not."""
    labels: Tensor | None = None
    """Class of each image, int64, (S,), where it is known."""

    @abstractmethod
    def read(self, numbers: range, batch_size: int, stats: SamplingStats) -> Iterator[Tensor]:
        """The images of a range as uint8 NCHW, at most `batch_size` at a time.

        Args:
            stats: filled with what generating them cost.

        Raises:
            ValueError: one of them cannot be read or has another size.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that the images depend on, ready for JSON: work on images of an equal identity is resumed."""

    def metadata(self, stats: SamplingStats) -> dict[str, Any]:
        """Origin of the images and the cost of generating them, for a file of scores."""
        return {"images": self.name}


class FolderImages(Images):
    """Image files under a folder, in natural order of their paths; of a folder with splits, the training split."""

    def __init__(self, folder: Path, channels: int = 3, image_size: int | None = None) -> None:
        self.name, self.folder, self.channels, self.image_size = str(folder), folder, channels, image_size
        listing = list_images(folder, "none")
        self.notes = listing.notes()
        held_out = np.zeros(len(listing.files), dtype=bool) if listing.held_out is None else listing.held_out
        self.paths = [folder / file for file, out in zip(listing.files, held_out) if not out]
        self.count = len(self.paths)
        self.size = tuple(self._open(self.paths[0]).shape[:2])  # type: ignore[assignment]

    def read(self, numbers: range, batch_size: int, stats: SamplingStats) -> Iterator[Tensor]:
        for part in split(numbers, batch_size):
            pixels = [self._open(self.paths[i]) for i in part]
            for i, image in zip(part, pixels):
                if image.shape[:2] != self.size:
                    raise ValueError(
                        f"{self.paths[i]} has {image.shape[0]} x {image.shape[1]} pixels, but {self.paths[0]} "
                        f"{self.size[0]} x {self.size[1]}; give images of one size"
                    )
            yield _nchw(np.stack(pixels))

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            status = path.stat()
            line = f"{path.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return {"files": digest.hexdigest(), "channels": self.channels, "image_size": self.image_size}

    def _open(self, path: Path) -> np.ndarray:
        """HWC, uint8."""
        try:
            image = decode_image(path, self.channels)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            raise ValueError(f"cannot read image {printable(str(path))} ({error}); remove it") from error
        square = image if self.image_size is None else cover_and_crop(image, self.image_size, self.image_size)
        return np.array(square).reshape(square.height, square.width, -1)


class NpzImages(Images):
    """uint8 images (NHWC or NHW) in an `.npz`, read in passing: the array need not fit into memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in ARRAYS if f"{name}.npy" in archive.namelist()]
                if not names:
                    raise ValueError(f"{path} has no array arr_0 or images, so it holds no images")
                self.member = f"{names[0]}.npy"
                with archive.open(self.member) as file:
                    shape, fortran_order, dtype = _header(file)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"cannot read {path} ({error})") from error
        channels = shape[3] if len(shape) == 4 else 1
        if dtype != np.uint8 or fortran_order or len(shape) not in (3, 4) or channels not in (1, 3) or 0 in shape:
            raise ValueError(
                f"{names[0]} in {path} is {dtype} {shape}; images are uint8 (count, height, width, 1 or 3 channels)"
            )
        self.count, self.size, self.channels = shape[0], (shape[1], shape[2]), channels

    def read(self, numbers: range, batch_size: int, stats: SamplingStats) -> Iterator[Tensor]:
        """Read images of the archive in batches, without unpacking all of it."""
        height, width = self.size
        image_bytes = height * width * self.channels
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                _header(file)
                file.seek(file.tell() + numbers.start * image_bytes)
                for part in split(numbers, batch_size):
                    content = file.read(len(part) * image_bytes)
                    if len(content) != len(part) * image_bytes:
                        raise ValueError(f"{self.path} ends before its image {numbers.stop - 1}")
                    yield _nchw(np.frombuffer(content, np.uint8).reshape(len(part), height, width, self.channels))
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"cannot read {self.path} ({error})") from error

    def identity(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"array": self.member, "bytes": status.st_size, "changed": status.st_mtime_ns}


class DatasetImages(Images):
    """The images of a data set as they are, without augmentation, read by some threads."""

    def __init__(self, dataset: ImageDataset, name: str, threads: int = 0) -> None:
        self.dataset, self.name, self.count, self.threads = dataset, name, len(dataset), threads
        self.notes = dataset.notes
        height, width = dataset.read([0]).images.shape[-2:]
        self.size = (height, width)

    def read(self, numbers: range, batch_size: int, stats: SamplingStats) -> Iterator[Tensor]:
        parts = split(numbers, batch_size)
        if self.threads == 0:
            yield from map(self._read, parts)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                yield from pool.map(self._read, parts)

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.name, "count": self.count}

    def _read(self, numbers: range) -> Tensor:
        batch = self.dataset.read(numbers)
        if batch.skipped:
            raise ValueError(
                f"{batch.skipped} of the images {numbers.start} to {numbers.stop - 1} of {self.name} cannot be read; "
                "statistics need them all: set data.on_corrupt to error to see their names, and remove them"
            )
        return to_uint8(batch.images)


class GeneratedImages(Images):
    """Images of a model: number i is a function of (seed, i), of the i-th class in turn or of prompt i."""

    def __init__(self, sampler: Sampler, prompts: PromptSource | None = None) -> None:
        self.sampler, self.prompts = sampler, prompts
        self.name, self.size = str(sampler.source.path), sampler.image_size
        self.count = sampler.settings.num_samples
        self.labels = class_schedule(self.count, sampler.source.config.num_classes)

    def read(self, numbers: range, batch_size: int, stats: SamplingStats) -> Iterator[Tensor]:
        first, stop = numbers.start, numbers.stop
        for images in self.sampler.batches(stop, self.labels, self.prompts, first=first, stats=stats):
            if not images.isfinite().all():
                raise ValueError(f"{self.name} generates images with values that are not finite; use other weights")
            yield to_uint8(images)

    def identity(self) -> dict[str, Any]:
        model, vae = self.sampler.model, self.sampler.vae
        settings = json.loads(json.dumps(vars(self.sampler.settings)))
        prompts = {} if self.prompts is None else self.prompts.identity()
        return {"model": fingerprint(model), "vae": vae and fingerprint(vae), "settings": settings} | prompts

    def metadata(self, stats: SamplingStats) -> dict[str, Any]:
        about = self.sampler.metadata(stats)
        if self.sampler.source.config.pools_batch:  # images then depend on their batch
            about["batch_size"] = self.sampler.settings.batch_size
        return about | ({} if self.prompts is None else self.prompts.metadata())


def open_images(path: Path, channels: int = 3, image_size: int | None = None) -> Images:
    """The images of a folder or an `.npz`.

    Args:
        channels: channels that files are read with.
        image_size: side of the square in pixels that files are resized and cropped to; None: they are not.

    Raises:
        ValueError: there are none.
    """
    if path.is_dir():
        return FolderImages(path, channels, image_size)
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path} is no folder and no .npz file; give images")
    if image_size is not None:
        raise ValueError(f"--image_size is {image_size}, but the images of {path} are not resized; remove the option")
    return NpzImages(path)


def split(numbers: range, size: int) -> list[range]:
    """Consecutive parts of at most `size` numbers."""
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def digests_of(images: Tensor) -> Tensor:
    """SHA-256 of each image's pixels, uint8, (S, 32)."""
    rows = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), 32)


def digest_of_all(digests: Tensor) -> str:
    """One hash of many images in their order, for files of scores."""
    return hashlib.sha256(digests.contiguous().numpy().tobytes()).hexdigest()[:HASH_DIGITS]


def _nchw(pixels_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_NHWC.copy()).permute(0, 3, 1, 2).contiguous()


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an array in the npy format; leaves the file at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
