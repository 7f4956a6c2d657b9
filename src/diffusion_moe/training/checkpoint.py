"""Checkpoints of a training state: which tensors it is made of, and which checkpoint to go on from.

`storage` writes and reads them: sharded safetensors, atomic, verified when read, in the background.

    model.NAME                   weights and routing state
    ema.NAME, ema_DECAY.NAME     their moving averages
    optimizer.MOMENT.NAME        AdamW's moments and step counts
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..config import TrainingConfig
from ..models import Backbone
from .start import copy_frozen
from .step import TrainState
from .storage import AsyncWriter, CheckpointError, checkpoints_in, latest, read


class Resumed(NamedTuple):
    """Where a run goes on from."""

    path: Path | None
    """The newest good checkpoint; None if there is none."""
    problems: list[str]
    """One line for each newer one that could not be used."""


class Checkpoints:
    """The checkpoints of a run. All processes call every method together."""

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        self.folder = folder
        self.writer = AsyncWriter(folder, training.keep_checkpoints, training.keep_every)

    def save(self, state: TrainState) -> None:
        """Begin to write the state as it is now; training may go on. The last save must have ended well.

        Raises:
            OSError, CheckpointError: why it has not.
        """
        self.writer.save(state.step, state_tensors(state), {"step": state.step, "excluded": sorted(state.excluded)})

    def wait(self) -> None:
        """Until the last save is on the disk; raises as `save` does."""
        self.writer.wait()

    def close(self) -> None:
        """Wait and end."""
        self.writer.close()

    def newest(self) -> int | None:
        """The step of the newest checkpoint."""
        paths = checkpoints_in(self.folder)
        return int(paths[0].name[5:]) if paths else None

    def load_latest(self, state: TrainState) -> Resumed:
        """Fill `state` from the newest good checkpoint."""
        found = latest(self.folder, lambda path: load_checkpoint(path, state))
        return Resumed(found.path, found.problems)


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a checkpoint, also of another number of processes.

    Raises:
        CheckpointError: it is damaged, or not of this recipe's model; says what is wrong.
    """
    about = read(path, state_tensors(state))
    copy_frozen(state.model, _averages(state).values())
    try:
        state.step, state.excluded = int(about["step"]), {int(step) for step in about["excluded"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} does not tell its step; it is of another version") from error


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by name, sharing its memory; what is frozen stands under `model` alone."""
    frozen = {name for name, parameter in state.model.named_parameters() if not parameter.requires_grad}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in state.model.state_dict().items()}
    for kind, ema in _averages(state).items():
        tensors |= {f"{kind}.{name}": t.detach() for name, t in ema.state_dict().items() if name not in frozen}
    return tensors | {f"optimizer.{name}": moment for name, moment in state.optimizer.named_moments().items()}


def _averages(state: TrainState) -> dict[str, Backbone]:
    return {"ema": state.ema} | {f"ema_{decay}": ema for decay, ema in state.more_emas.items()}
