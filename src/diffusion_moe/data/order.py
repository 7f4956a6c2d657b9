"""Order of the training images: a function of (seed, position), whose state is the step and the batch sizes so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..counts import images_per_process
from ..randomness import derive_seed, uniform


class Segment(NamedTuple):
    """Consecutive steps with one global batch size."""

    first: int
    """Steps done before the segment."""
    batch_size: int
    """Images of a global batch."""


def batch_size_at(segments: Sequence[Segment], step: int) -> int:
    """Images of a step's global batch.

    Args:
        segments: ascending, the first one from step 0.
        step: number of the step, from 1.
    """
    return next(segment.batch_size for segment in reversed(segments) if segment.first < step)


class SampledImage(NamedTuple):
    """One image of the stream; its augmentation is a function of (seed, epoch, image)."""

    image: int
    """Index in the data set."""
    epoch: int
    position: int = 0
    """Position in the step's global batch, the same for any number of processes."""


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 ... size - 1, a function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator).tolist()


def positions_of(batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Positions in the step's global batch that one process computes: int64, ascending, a tensor a micro-batch.

    A micro-batch is a part of the global batch, and a rank's share a part of that. The ranks' shares, one after
    another, are the micro-batch of a single process.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    images_per_process(batch_size, accumulation, world)
    return list(torch.arange(batch_size).view(accumulation, world, -1)[:, rank])


def batches_from(
    step: int,
    last_step: int,
    size: int,
    batch_size: int | Sequence[Segment],
    seed: int,
    positions: Sequence[int] | Tensor | None = None,
    buckets: np.ndarray | None = None,
) -> Iterator[list[SampledImage]]:
    """Batches of steps `step` + 1 to `last_step`, or one process' part of each.

    A stream is one epoch's permutation after another, and a batch may cross the border of two epochs. So no image is
    dropped, and a resumed run needs only the step and the batch sizes so far.

    Each bucket has a stream of its own. A step takes its batch from one of them: a function of (seed, step), with the
    bucket's share of the images as probability.

    Args:
        size: images in the data set.
        batch_size: images of a global batch; the segments of steps if it has changed.
        positions: positions in the global batch to give, ascending (see `positions_of`); None: all.
        buckets: bucket of each image, int64; None: a single one.
    """
    segments = (Segment(0, batch_size),) if isinstance(batch_size, int) else batch_size
    batch_sizes = np.empty(last_step, dtype=np.int64)
    for segment in segments:
        batch_sizes[segment.first :] = segment.batch_size
    if buckets is None:
        members = [np.arange(size)]
        seeds = [seed]
        chosen = np.zeros(last_step, dtype=np.int64)
    else:
        members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        seeds = [derive_seed(seed, "bucket", number) for number in range(len(members))]
        shares = np.cumsum([len(images) for images in members]) / len(buckets)
        sampled = uniform(seed, "bucket", 0, torch.arange(last_step)).numpy()
        chosen = np.searchsorted(shares, sampled, side="right").clip(max=len(members) - 1)
    done = [int(batch_sizes[:step][chosen[:step] == number].sum()) for number in range(len(members))]
    streams = [_stream(images, its_seed, first) for images, its_seed, first in zip(members, seeds, done)]
    wanted = None if positions is None else [int(position) for position in positions]
    for number, count in zip(chosen[step:].tolist(), batch_sizes[step:].tolist()):
        batch = list(itertools.islice(streams[number], count))
        yield [SampledImage(batch[i][0], batch[i][1], i) for i in (range(count) if wanted is None else wanted)]


def _stream(images: np.ndarray, seed: int, first: int) -> Iterator[tuple[int, int]]:
    """Images with their epochs, one epoch's permutation after another, without the `first` ones."""
    epoch, start = divmod(first, len(images))
    while True:
        for i in epoch_order(len(images), seed, epoch)[start:]:
            yield int(images[i]), epoch
        epoch, start = epoch + 1, 0
