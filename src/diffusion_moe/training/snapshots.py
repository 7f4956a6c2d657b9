"""Snapshots of post-hoc EMAs: all that `posthoc_ema` needs to make an EMA of another width after training.

They are checkpoints (see `storage`) of the tensors `posthoc_STD.NAME` alone, and none is deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..distributed import is_main
from ..storage import AsyncWriter, checkpoints_in, step_of
from .checkpoint import state_tensors
from .state import TrainState


class Snapshots(AsyncWriter):
    """The snapshots of a run. All processes call every method together."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep=1, keep_every=1)

    def save_state(self, state: TrainState) -> None:
        """Begin to write the EMAs as they are now (see `save`); training may continue."""
        tensors = {name: tensor for name, tensor in state_tensors(state).items() if name.startswith("posthoc_")}
        self.save(state.step, tensors, {"step": state.step})

    def forget_after(self, step: int) -> None:
        """Delete the snapshots of later steps, which a run that resumes from this step takes again."""
        self.wait()
        if is_main():
            for path in checkpoints_in(self.folder):
                if step_of(path) > step:
                    shutil.rmtree(path)
