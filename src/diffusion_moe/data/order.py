"""The order of training: a function of (seed, position), whose only state is the step and the sizes of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..counts import images_per_process
from ..randomness import derive_seed, uniform


class Segment(NamedTuple):
    """Steps in a row whose global batches are of one size."""

    first: int
    """Steps done before it."""
    batch_size: int
    """Images of a global batch."""


def batch_size_at(segments: Sequence[Segment], step: int) -> int:
    """Images of step number `step`, from 1.

    Args:
        segments: ascending, the first one from step 0.
    """
    return next(segment.batch_size for segment in reversed(segments) if segment.first < step)


def images_before(segments: Sequence[Segment], step: int) -> int:
    """Images of the first `step` steps together: where the stream stands after them."""
    ends = [min(segment.first, step) for segment in segments[1:]] + [step]
    return sum(segment.batch_size * (end - min(segment.first, step)) for segment, end in zip(segments, ends))


class Draw(NamedTuple):
    """One image of the stream; augmentation is a function of (seed, epoch, image)."""

    image: int
    """Its index in the data set."""
    epoch: int
    place: int = 0
    """In the step's global batch, the same for any number of processes."""


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 ... size - 1, a function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator).tolist()


def places_of(batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Places in the step's global batch that one process computes: int64, ascending, a tensor a micro-batch.

    Micro-batch m is the m-th part of the global batch and a rank's share a part of that, so that the ranks' shares, one
    after another, are the micro-batch of a single process.

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
    places: Sequence[int] | Tensor | None = None,
    buckets: np.ndarray | None = None,
) -> Iterator[list[Draw]]:
    """Batches of steps `step` + 1 to `last_step`, or one process' part of each.

    The stream is one epoch's permutation after another, and batches take it one after another, also across the seam of
    two epochs. So no image is dropped, whatever sizes the batches have had, and a resumed run needs to know the step
    and those sizes alone.

    With buckets each has a stream of its own, and a step draws from one of them, by (seed, step), as often as it has
    images.

    Args:
        size: images in the data set.
        batch_size: images of a global batch; where it has changed, the segments of steps of one size.
        places: those of the global batch to give, ascending (see `places_of`); all of them unless given.
        buckets: bucket of each image, int64; None: they are all alike.
    """
    segments = (Segment(0, batch_size),) if isinstance(batch_size, int) else batch_size
    wanted = None if places is None else [int(place) for place in places]
    if buckets is not None:
        yield from _batches_of_buckets(step, last_step, buckets, segments, seed, wanted)
        return
    epoch, order = -1, []
    for number in range(step + 1, last_step + 1):
        start, batch = images_before(segments, number - 1), []
        for place in range(batch_size_at(segments, number)) if wanted is None else wanted:
            position = start + place
            if position // size != epoch:
                epoch = position // size
                order = epoch_order(size, seed, epoch)
            batch.append(Draw(order[position % size], epoch, place))
        yield batch


def _batches_of_buckets(
    step: int, last_step: int, buckets: np.ndarray, segments: Sequence[Segment], seed: int, wanted: list[int] | None
) -> Iterator[list[Draw]]:
    members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
    shares = np.cumsum([len(images) for images in members]) / len(buckets)
    drawn = uniform(seed, "bucket", 0, torch.arange(last_step)).numpy()
    chosen = np.searchsorted(shares, drawn, side="right").clip(max=len(members) - 1)
    sizes = np.empty(last_step, dtype=np.int64)
    for segment in segments:
        sizes[segment.first :] = segment.batch_size
    seen = [int(sizes[:step][chosen[:step] == number].sum()) for number in range(len(members))]
    orders: dict[int, tuple[int, list[int]]] = {}
    for number, batch_size in zip(chosen[step:].tolist(), sizes[step:].tolist()):
        images, start = members[number], seen[number]
        seen[number] += batch_size
        batch = []
        for place in range(batch_size) if wanted is None else wanted:
            epoch, position = divmod(start + place, len(images))
            if orders.get(number, (-1, []))[0] != epoch:
                orders[number] = epoch, epoch_order(len(images), derive_seed(seed, "bucket", number), epoch)
            batch.append(Draw(int(images[orders[number][1][position]]), epoch, place))
        yield batch
