"""The order of training: a function of (seed, position), whose only state is the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..randomness import derive_seed


class Draw(NamedTuple):
    """One image of the stream: its place in the data set, and the epoch (augmentation depends on both)."""

    place: int
    epoch: int


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 ... size - 1, a function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator).tolist()


def batches_from(step: int, last_step: int, size: int, batch_size: int, seed: int) -> Iterator[list[Draw]]:
    """Batches of steps `step` + 1 to `last_step`.

    The stream is one epoch's permutation after another; batch s holds its positions s * batch_size onwards, also across
    the seam of two epochs. So no image is dropped and a resumed run needs to know the step alone.
    """
    epoch, order = -1, []
    for position in range(step * batch_size, last_step * batch_size, batch_size):
        batch = []
        for place in range(position, position + batch_size):
            if place // size != epoch:
                epoch = place // size
                order = epoch_order(size, seed, epoch)
            batch.append(Draw(order[place % size], epoch))
        yield batch
