"""Data sets of labelled images or latents with a fixed split into training and test."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..randomness import uniform
from ..text import TextFeatures
from .captions import CaptionFeatures
from .order import SampledImage
from .workers import START_METHOD, SentDataset, begin_worker, start_fork_server


class Batch(NamedTuple):
    """Images with their labels, and in training their positions and captions."""

    images: Tensor
    """NCHW, float32: images in [-1, 1], or latents as the model sees them."""
    labels: Tensor
    """Classes, int64, (B,)."""
    skipped_names: Sequence[str] = ()
    """Names of the unreadable images that another image replaces."""
    positions: Tensor | None = None
    """Position of each image in the step's global batch, int64, (B,); None outside of training."""
    indices: Sequence[int] | None = None
    """Index of each image in the data set, if unreadable ones may be replaced; None: the requested ones."""
    text: TextFeatures | None = None
    """Features of one caption of each image, if the captions are encoded."""

    @property
    def skipped(self) -> int:
        """Number of unreadable images that another image replaces."""
        return len(self.skipped_names)

    def samples(self, device: torch.device) -> Tensor:
        """Position of each image in the global batch, on a device; without positions its index in this batch."""
        if self.positions is None:
            return torch.arange(len(self.images), device=device)
        return self.positions.to(device, non_blocking=True)

    def micro_batches(self, number: int) -> list[Batch]:
        """Up to `number` equal parts, in order and without positions; views, so that pinned memory stays pinned."""
        size = math.ceil(len(self.images) / number)
        return [self._rows(slice(start, start + size)) for start in range(0, len(self.images), size)]

    def _rows(self, rows: slice) -> Batch:
        text = None if self.text is None else self.text.rows(rows)
        return Batch(self.images[rows], self.labels[rows], text=text)


class ImageDataset(ABC):
    """Labelled images, read in batches of `SampledImage`; augmentation is a function of (seed, epoch, index)."""

    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    """Name of each class."""
    texts: CaptionFeatures | None = None
    """Features of the captions, if they are encoded."""
    buckets: np.ndarray | None = None
    """Bucket of each image, int64, if images have several sizes; a batch is of one bucket."""
    bucket_sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of each bucket."""
    notes: Sequence[str] = ()
    """Lines for the user: how the data is split, and what is left out."""
    shape_remedy = "change the model's, or take other data"
    """Remedy if the images do not have the model's shape."""

    def __init__(self, flip: bool, seed: int) -> None:
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Batch:
        """Images without augmentation."""

    def read_augmented(self, indices: Tensor, epochs: Tensor) -> Batch:
        """Images with the augmentation of their epochs; both int64, (B,)."""
        batch = self.read(indices.tolist())
        mirrored = self.mirrored(indices, epochs)
        return batch._replace(images=torch.where(mirrored[:, None, None, None], batch.images.flip(-1), batch.images))

    def mirrored(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """True for images that their epoch mirrors left to right, bool, (B,)."""
        if not self.flip:
            return torch.zeros_like(indices, dtype=torch.bool)
        return uniform(self.seed, "flip", epochs, indices) < 0.5

    def __getitems__(self, sampled: Sequence[SampledImage]) -> Batch:
        """A training batch; torch's DataLoader looks for this name to fetch a batch at once."""
        indices, epochs, positions = torch.tensor(sampled).unbind(1)
        # Contiguous: a copy of a strided tensor to the device waits, as it is packed in memory that is not pinned.
        batch = self.read_augmented(indices, epochs)._replace(positions=positions.contiguous())
        if self.texts is None:
            return batch
        if batch.indices is not None:
            indices = torch.tensor(batch.indices)
        return batch._replace(text=self.texts.sample(self.seed, indices, epochs))

    def captions(self, index: int) -> Sequence[str]:
        """Captions of an image; empty without any."""
        return ()

    def first_texts(self, indices: Tensor) -> TextFeatures | None:
        """Features of each image's first caption, which evaluation uses; None without captions."""
        return None if self.texts is None else self.texts.take(indices, torch.zeros_like(indices))

    def read_all(self) -> Batch:
        """All images in order."""
        return self.read(range(len(self)))

    def identity(self) -> str | None:
        """A hash of the images' names or contents, in order; None for data that never changes."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Class names, text encoder and latent space, which a trained model keeps, as plain values."""
        text = {} if self.texts is None else {"text": asdict(self.texts.space)}
        return {"class_names": self.class_names} | text


def load_batches(
    dataset: Any,
    batches: Iterable[Sequence[Any]],
    num_workers: int,
    init_worker: Callable[[int], None] | None = None,
) -> Generator[Any, None, None]:
    """Results of `dataset.__getitems__` for each batch, in advance by worker processes, if any.

    Raises:
        ValueError: a batch cannot be loaded; in one line, also from a worker.
    """
    if num_workers:
        start_fork_server()
    loader: DataLoader = DataLoader(
        SentDataset(dataset) if num_workers else dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]  # iterated once, so it need not be a list
        num_workers=num_workers,
        multiprocessing_context=START_METHOD if num_workers else None,
        collate_fn=_whole_batch,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(begin_worker, init_worker),
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except ValueError as error:  # from a worker it contains a traceback, whose last line is the message
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    finally:
        if num_workers:  # they may ignore SIGTERM
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _whole_batch(batch: Any) -> Any:
    return batch
