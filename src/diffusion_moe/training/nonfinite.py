"""Steps whose loss or gradient is not finite: skipped, rolled back, and in the end reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from ..config import Recipe
from ..data import ImageDataset, Segment
from ..distributed import is_main
from ..run_folder import RunFolder, write_atomically
from .dataloader import images_of_step
from .state import TrainState


class NonFiniteError(ArithmeticError):
    """The loss stays non-finite; the message names the file that lists the images."""


class RollBack(Exception):
    """Too many steps in a row were not finite."""


class NonFiniteSteps:
    """The rule for steps that are not finite.

    `train_step` changes no weight in such a step. Up to `limit` in a row are skipped. One more rolls back to the last
    checkpoint, and the batches of all of them are skipped from then on. If the steps after those stay non-finite, the
    roll-back has not helped, and the run stops. The first finite step after them is saved at once: the next roll-back
    leads there, so that a run with many bad batches still reaches its end.

    No checkpoint is saved between non-finite steps, except at the last step; it is postponed to the next finite one.

    Attributes:
        state: the training state, whose `nonfinite_steps`, `skipped_steps` and `rolled_back` this class keeps.
        limit: training.max_nonfinite_steps.
        checkpoint_due: a checkpoint was due and is postponed.
    """

    def __init__(self, state: TrainState, limit: int) -> None:
        self.state, self.limit = state, limit
        self.checkpoint_due = False

    @property
    def undecided(self) -> bool:
        """True if the result of the step in progress decides what is saved; it must be read before the next step."""
        return self.checkpoint_due or self.state.rolled_back

    def note(self, step: int, finite: bool) -> None:
        """Take the result of a step into account.

        Raises:
            RollBack: more than `limit` steps in a row were not finite.
        """
        state = self.state
        if finite:
            state.nonfinite_steps.clear()
            if state.rolled_back and step > max(state.skipped_steps, default=0):
                state.rolled_back, self.checkpoint_due = False, True
            return
        state.nonfinite_steps.append(step)
        if len(state.nonfinite_steps) > self.limit:
            raise RollBack

    def should_save(self, due: bool, last: bool) -> bool:
        """True if a checkpoint is to be saved now.

        Args:
            due: one is due after this step.
            last: this is the last step.
        """
        self.checkpoint_due |= due
        if not self.checkpoint_due or (self.state.nonfinite_steps and not last):
            return False
        self.checkpoint_due = False
        return True

    def roll_back(self, load: Callable[[], None]) -> list[int] | None:
        """Load the last checkpoint and skip the non-finite steps; returns them, or None if it was tried before.

        Args:
            load: loads the last checkpoint into the state.
        """
        state, steps = self.state, list(self.state.nonfinite_steps)
        if state.rolled_back:
            return None
        skipped = state.skipped_steps | set(steps)
        load()
        state.skipped_steps, state.nonfinite_steps, state.rolled_back = skipped, [], True
        self.checkpoint_due = False
        return steps


def report_images(
    run: RunFolder, recipe: Recipe, dataset: ImageDataset, steps: list[int], segments: Sequence[Segment]
) -> str:
    """List the images of non-finite steps in the run folder; returns a message that names the file."""
    if is_main():
        images = {str(step): images_of_step(recipe, dataset, step, segments) for step in steps}
        write_atomically(run.nonfinite_steps, json.dumps({"steps": steps, "training_images": images}) + "\n")
    return (
        f"the loss or gradient of steps {steps[0]} to {steps[-1]} is not finite, also after rolling back; "
        f"{run.nonfinite_steps} lists their images. Change the learning rate or the data (--resume changed), or raise "
        "training.max_nonfinite_steps"
    )
