"""The order of training: a function of (seed, position), whose only state is the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..randomness import derive_seed, uniform


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
    parts = accumulation * world
    if batch_size % parts:
        raise ValueError(
            f"training.batch_size {batch_size} is not divisible by training.accumulation {accumulation} x "
            f"{world} processes = {parts}"
        )
    return list(torch.arange(batch_size).view(accumulation, world, -1)[:, rank])


def batches_from(
    step: int,
    last_step: int,
    size: int,
    batch_size: int,
    seed: int,
    places: Sequence[int] | Tensor | None = None,
    buckets: np.ndarray | None = None,
) -> Iterator[list[Draw]]:
    """Batches of steps `step` + 1 to `last_step`, or one process' part of each.

    The stream is one epoch's permutation after another; batch s holds its positions s * batch_size onwards, also across
    the seam of two epochs. So no image is dropped and a resumed run needs to know the step alone.

    With buckets each has a stream of its own, and a step draws from one of them, by (seed, step), as often as it has
    images.

    Args:
        size: images in the data set. batch_size: images of a global batch.
        places: those of the global batch to give, ascending (see `places_of`); all of them unless given.
        buckets: bucket of each image, int64; None: they are all alike.
    """
    epoch, order = -1, []
    wanted = list(range(batch_size)) if places is None else [int(place) for place in places]
    if buckets is not None:
        yield from _batches_of_buckets(step, last_step, buckets, batch_size, seed, wanted)
        return
    for start in range(step * batch_size, last_step * batch_size, batch_size):
        batch = []
        for place in wanted:
            position = start + place
            if position // size != epoch:
                epoch = position // size
                order = epoch_order(size, seed, epoch)
            batch.append(Draw(order[position % size], epoch, place))
        yield batch


def _batches_of_buckets(
    step: int, last_step: int, buckets: np.ndarray, batch_size: int, seed: int, wanted: list[int]
) -> Iterator[list[Draw]]:
    members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
    shares = np.cumsum([len(images) for images in members]) / len(buckets)
    drawn = uniform(seed, "bucket", 0, torch.arange(last_step)).numpy()
    chosen = np.searchsorted(shares, drawn, side="right").clip(max=len(members) - 1)
    seen = np.bincount(chosen[:step], minlength=len(members))
    orders: dict[int, tuple[int, list[int]]] = {}
    for number in chosen[step:].tolist():
        images, start = members[number], int(seen[number]) * batch_size
        seen[number] += 1
        batch = []
        for place in wanted:
            epoch, position = divmod(start + place, len(images))
            if orders.get(number, (-1, []))[0] != epoch:
                orders[number] = epoch, epoch_order(len(images), derive_seed(seed, "bucket", number), epoch)
            batch.append(Draw(int(images[orders[number][1][position]]), epoch, place))
        yield batch
