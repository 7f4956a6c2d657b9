"""Resumption of a run with another recipe: batch sizes by step, and skipped steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Recipe
from ..data import ImageDataset, Segment, batches_from
from ..data.order import batch_size_at
from .dataloader import samples_of_step
from .state import TrainState


def extend_segments(segments: Sequence[Segment], step: int, batch_size: int) -> tuple[Segment, ...]:
    """Batch sizes of a run that resumes after `step` with another batch size."""
    kept = tuple(segment for segment in segments if segment.first < step)
    return kept if kept and kept[-1].batch_size == batch_size else (*kept, Segment(step if kept else 0, batch_size))


def resume_with(state: TrainState, recipe: Recipe, dataset: ImageDataset) -> list[str]:
    """Adapt a loaded state to the recipe it resumes with, in place.

    If batches have another size from here on, the images of steps to skip are in other steps: those are skipped
    instead.

    Returns:
        A line for the user if other steps are skipped.
    """
    step, before = state.step, state.segments
    after = state.segments = extend_segments(before, step, recipe.training.batch_size)
    later = {skipped for skipped in state.skipped_steps if skipped > step}
    if not later or batch_size_at(before, step + 1) == batch_size_at(after, step + 1):
        return []
    images = {sample[:2] for skipped in later for sample in samples_of_step(recipe, dataset, skipped, before)}
    moved = _steps_of(images, recipe, dataset, step, after)
    state.skipped_steps = state.skipped_steps - later | moved
    return [f"the batch size changes: steps {_listed(moved)} are skipped instead of {_listed(later)}"]


def _steps_of(
    samples: set[tuple[int, int]], recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment]
) -> set[int]:
    """The steps after `step` whose batches contain any of these images in these epochs."""
    steps, last = set(), recipe.training.steps
    order = batches_from(step, last, len(dataset), segments, recipe.training.seed, None, dataset.buckets)
    for number, batch in enumerate(order, start=step + 1):
        found = samples & {(sample.image, sample.epoch) for sample in batch}
        if found:
            steps.add(number)
            samples = samples - found
        if not samples:
            break
    return steps


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"
