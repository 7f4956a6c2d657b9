"""Checkpoints of a training state: which tensors it is made of, and which checkpoint to go on from.

`storage` writes and reads them: sharded safetensors, atomic, verified when read, in the background.

    model.NAME                   weights and routing state
    ema.NAME, ema_DECAY.NAME     their moving averages
    optimizer.MOMENT.NAME        AdamW's moments and step counts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch.distributed as dist
from torch import Tensor

from ..config import TrainingConfig
from ..data import Segment
from ..models import Backbone
from ..storage import AsyncWriter, CheckpointError, Manifest, latest, read
from .ema import begin_average
from .initialization import copy_frozen
from .step import TrainState


class Resumed(NamedTuple):
    """Where a run goes on from."""

    path: Path | None
    """The newest good checkpoint; None if there is none."""
    problems: list[str]
    """One line for each newer one that could not be used."""


class Checkpoints:
    """The checkpoints of a run. All processes call every method together."""

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        self.folder, self.seed = folder, training.seed
        self.notes: list[str] = []
        """Lines about what the state that was loaded last has besides, or has no more."""
        self.writer = AsyncWriter(folder, training.keep_checkpoints, training.keep_every)

    def save(self, state: TrainState) -> None:
        """Begin to write the state as it is now; training may go on. The last save must have ended well.

        Raises:
            OSError, CheckpointError: why it has not.
        """
        about = {
            "step": state.step,
            "skipped_steps": sorted(state.skipped_steps),
            "bad": state.bad,
            "rolled_back": state.rolled_back,
        }
        about |= {"seed": self.seed, "batch_sizes": [list(segment) for segment in state.segments]}
        self.writer.save(state.step, state_tensors(state), about)

    def failed(self) -> bool:
        """Whether it is known that the save under way has failed; `save` and `wait` say why."""
        under_way = self.writer._under_way
        return under_way is not None and under_way.done() and under_way.exception() is not None

    def wait(self) -> None:
        """Until the last save is on the disk; raises as `save` does."""
        self.writer.wait()

    def close(self) -> None:
        """Wait and end."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: Any) -> None:
        """As `close`; an error that is under way already stays the one that is raised."""
        self.writer.__exit__(*reason)

    def load_latest(self, state: TrainState) -> Resumed:
        """Fill `state` from the newest good checkpoint; no save may be under way."""
        group = self.writer.group  # idle, for nothing is being saved; beside NCCL what is told must not go by the GPU
        found = latest(self.folder, lambda path: load_checkpoint(path, state, group, self.seed), group=group)
        self.notes = found.loaded or []
        return Resumed(found.path, found.problems)


def load_checkpoint(
    path: Path, state: TrainState, group: dist.ProcessGroup | None = None, seed: int | None = None
) -> list[str]:
    """Fill `state` from a checkpoint, also of another number of processes or with other further averages.

    A further average that the checkpoint lacks begins at the weights. A checkpoint of an older version does not tell
    the sizes of its batches; those of the state stay.

    Args:
        group: of the processes that read, see `storage.read`.
        seed: of the recipe that goes on. In the order of another one the steps that are left out mean other images,
            so those to come are forgotten.

    Returns:
        A line for each further average that begins or is left out, and for steps that are forgotten.

    Raises:
        CheckpointError: it is damaged, or not of this recipe's model; says what is wrong.
    """
    try:
        about = read(path, state_tensors(state), group=group, optional=lambda name: name.startswith("ema_"))
    except CheckpointError as error:
        if ".router.correction" in str(error):
            raise CheckpointError(f"{error}; the version before wrote it, which this one cannot resume") from error
        raise
    begun, dropped = _changed_averages(path, state)
    for decay in begun:
        begin_average(state.extra_emas[decay], state.model)
    copy_frozen(state.model, _averages(state).values())
    try:
        state.step, state.rolled_back = int(about["step"]), bool(about["rolled_back"])
        state.skipped_steps = {int(step) for step in about["skipped_steps"]}
        state.bad = [int(step) for step in about["bad"]]
        sizes = [Segment(int(first), int(size)) for first, size in about.get("batch_sizes", ())]
        known_seed = int(about.get("seed", seed or 0))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} does not tell its step; it is of another version") from error
    state.segments = tuple(sizes) or state.segments
    notes = [f"the average of decay {decay} begins at the weights of step {state.step}" for decay in begun]
    notes += [f"the average of decay {decay} is no longer kept" for decay in dropped]
    later = {step for step in state.skipped_steps if step > state.step}
    if seed is not None and seed != known_seed and later:
        state.skipped_steps, state.rolled_back = state.skipped_steps - later, False
        notes.append(f"the order is another one: steps {min(later)} to {max(later)} are no longer left out")
    return notes


def _changed_averages(path: Path, state: TrainState) -> tuple[list[float], list[str]]:
    """Decays of further averages that a state has and a checkpoint has not, and of those that it has besides."""
    frozen = {name for name, parameter in state.model.named_parameters() if not parameter.requires_grad}
    one = next(name for name in state.model.state_dict() if name not in frozen)
    saved = {
        name.removeprefix("ema_").removesuffix(f".{one}")
        for name in Manifest.read(path).tensors
        if name.startswith("ema_") and name.endswith(f".{one}")
    }
    kept = {str(decay) for decay in state.extra_emas}
    return [decay for decay in state.extra_emas if str(decay) not in saved], sorted(saved - kept)


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by name, sharing its memory; what is frozen stands under `model` alone."""
    frozen = {name for name, parameter in state.model.named_parameters() if not parameter.requires_grad}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in state.model.state_dict().items()}
    for kind, ema in _averages(state).items():
        tensors |= {f"{kind}.{name}": t.detach() for name, t in ema.state_dict().items() if name not in frozen}
    return tensors | {f"optimizer.{name}": moment for name, moment in state.optimizer.named_moments().items()}


def _averages(state: TrainState) -> dict[str, Backbone]:
    return {"ema": state.ema} | {f"ema_{decay}": ema for decay, ema in state.extra_emas.items()}
