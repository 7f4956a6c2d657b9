"""Batches of a run from a given step on: this process' part of each, loaded in advance by workers, if any."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence

import torch

from ..config import Recipe
from ..data import Batch, ImageDataset, Segment, batches_from, positions_of
from ..data.dataset import load_batches
from ..data.order import SampledImage
from ..distributed import rank, world_size


def batches(
    recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment] = ()
) -> Generator[Batch, None, None]:
    """This process' parts of the batches of steps `step` + 1 to the recipe's last.

    Args:
        step: number of steps done.
        segments: the run's batch sizes; by default the recipe's from the first step on.

    Raises:
        ValueError: the global batch cannot be divided evenly, or an image cannot be read.
    """
    training = recipe.training
    positions = torch.cat(positions_of(training.batch_size, training.accumulation, rank(), world_size()))
    order = batches_from(
        step, training.steps, len(dataset), segments or training.batch_size, training.seed, positions, dataset.buckets
    )
    return load_batches(dataset, order, recipe.data.num_workers, _ignore_signals)


def samples_of_step(
    recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment] = ()
) -> list[SampledImage]:
    """Images of a step's global batch, as samples of the training split (arguments as for `batches`)."""
    sizes = segments or recipe.training.batch_size
    (samples,) = batches_from(step - 1, step, len(dataset), sizes, recipe.training.seed, None, dataset.buckets)
    return samples


def images_of_step(recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment] = ()) -> list[int]:
    """Indices in the training split of a step's images."""
    return [sample.image for sample in samples_of_step(recipe, dataset, step, segments)]


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker: Ctrl-C reaches the whole process group, but the loop needs workers until it saves."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
