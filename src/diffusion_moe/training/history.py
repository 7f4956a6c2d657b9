"""How a run goes on under another recipe: sizes of batches by step, and the steps that are left out."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Recipe
from ..data import ImageDataset, Segment, batches_from
from ..data.order import batch_size_at
from .step import TrainState


def continued(segments: Sequence[Segment], step: int, batch_size: int) -> tuple[Segment, ...]:
    """The sizes of a run's batches when it goes on after `step` with batches of a size."""
    kept = tuple(segment for segment in segments if segment.first < step)
    return kept if kept and kept[-1].batch_size == batch_size else (*kept, Segment(step if kept else 0, batch_size))


def go_on(state: TrainState, recipe: Recipe, dataset: ImageDataset) -> list[str]:
    """Let a state that was loaded go on by a recipe, in place.

    If batches have another size from here on, the images of steps that are to be left out are in other steps: those
    are left out instead.

    Returns:
        A line if other steps are left out.
    """
    step, before = state.step, state.segments
    after = state.segments = continued(before, step, recipe.training.batch_size)
    later = {skipped_steps for skipped_steps in state.skipped_steps if skipped_steps > step}
    if not later or batch_size_at(before, step + 1) == batch_size_at(after, step + 1):
        return []
    moved = _steps_of(_draws(recipe, dataset, later, before), recipe, dataset, step, after)
    state.skipped_steps = state.skipped_steps - later | moved
    return [f"batches have another size: steps {_listed(moved)} are left out, not {_listed(later)}"]


def _draws(recipe: Recipe, dataset: ImageDataset, steps: set[int], segments: Sequence[Segment]) -> set[tuple[int, int]]:
    """Images of some steps, with their epochs."""
    found = set()
    for step in steps:
        order = batches_from(step - 1, step, len(dataset), segments, recipe.training.seed, None, dataset.buckets)
        found |= {(draw.image, draw.epoch) for batch in order for draw in batch}
    return found


def _steps_of(
    draws: set[tuple[int, int]], recipe: Recipe, dataset: ImageDataset, step: int, segments: Sequence[Segment]
) -> set[int]:
    """The steps after `step` whose batches have any of these images in these epochs."""
    steps, last = set(), recipe.training.steps
    order = batches_from(step, last, len(dataset), segments, recipe.training.seed, None, dataset.buckets)
    for number, batch in enumerate(order, start=step + 1):
        here = draws & {(draw.image, draw.epoch) for draw in batch}
        if here:
            steps.add(number)
            draws = draws - here
        if not draws:
            break
    return steps


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"
