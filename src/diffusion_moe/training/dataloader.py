"""The batches of a run from a given step on: this process' share of each, loaded ahead where there are workers."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence

import torch
from torch.utils.data import DataLoader

from ..config import Recipe
from ..data import Batch, ImageDataset, Segment, batches_from, positions_of
from ..distributed import rank, world_size


def batches(
    recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment] = ()
) -> Generator[Batch, None, None]:
    """Batches of steps `step` + 1 to the recipe's last.

    Args:
        segments: the run's sizes of batches; the recipe's from the first step unless given.

    Raises:
        ValueError: the global batch cannot be divided evenly, or an image cannot be read.
    """
    training = recipe.training
    places = torch.cat(positions_of(training.batch_size, training.accumulation, rank(), world_size()))
    order = batches_from(
        step, training.steps, len(dataset), segments or training.batch_size, training.seed, places, dataset.buckets
    )
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # it fetches whole batches, see ImageDataset.__getitems__
        batch_sampler=order,  # type: ignore[arg-type]
        num_workers=recipe.data.num_workers,
        collate_fn=_as_fetched,  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except ValueError as error:  # a worker process sends its traceback along; its last line is the message
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    finally:
        if recipe.data.num_workers:  # they ignore SIGTERM, so that nobody else could end them
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def images_of_step(recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment] = ()) -> list[int]:
    """Places in the data set's training split of the images in a step's global batch.

    Args:
        segments: as for `batches`.
    """
    training = recipe.training
    sizes = segments or training.batch_size
    (draws,) = batches_from(step - 1, step, len(dataset), sizes, training.seed, None, dataset.buckets)
    return [draw.image for draw in draws]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop needs its workers until it has saved."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _as_fetched(batch: Batch) -> Batch:
    return batch
