"""Checkpoints of a training state: its tensors by name, and the choice of the checkpoint to resume from.

`storage` writes and reads them: sharded safetensors, atomic, verified when read, in the background.

    model.NAME                   weights and routing state
    ema.NAME, ema_DECAY.NAME     their EMAs
    posthoc_STD.NAME             those that are kept in snapshots
    optimizer.MOMENT.NAME        moments of AdamW with its step counts, momentum of Muon
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ..config import TrainingConfig
from ..data import Segment
from ..models import Backbone
from ..storage import AsyncWriter, CheckpointError, LoadedCheckpoint, Manifest, latest, read
from .ema import reset_ema
from .initialization import copy_frozen
from .state import TrainState


class Checkpoints(AsyncWriter):
    """The checkpoints of a run. All processes call every method together."""

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        super().__init__(folder, training.keep_checkpoints, training.keep_every)
        self.seed = training.seed

    def save_state(self, state: TrainState) -> None:
        """Begin to write the state as it is now (see `save`); training may continue."""
        metadata = {
            "step": state.step,
            "skipped_steps": sorted(state.skipped_steps),
            "nonfinite_steps": state.nonfinite_steps,
            "rolled_back": state.rolled_back,
            "seed": self.seed,
            "batch_sizes": [list(segment) for segment in state.segments],
        }
        self.save(state.step, state_tensors(state), metadata)

    def load_latest(self, state: TrainState) -> LoadedCheckpoint[list[str]]:
        """Fill `state` from the newest good checkpoint; no save may be in progress.

        Returns:
            The checkpoint, with lines for the user on how the state differs from it (see `load_checkpoint`).
        """
        group = self.group  # gloo: the default group may be NCCL, which would send messages through the GPU
        return latest(self.folder, lambda path: load_checkpoint(path, state, group, self.seed), group=group)


def load_checkpoint(
    path: Path, state: TrainState, group: dist.ProcessGroup | None = None, seed: int | None = None
) -> list[str]:
    """Fill `state` from a checkpoint, also of another number of processes or with other extra EMAs.

    An extra EMA that the checkpoint lacks starts at the weights.

    Args:
        group: the processes that read, see `storage.read`.
        seed: seed of the recipe that resumes. Another seed means another order, in which the skipped steps have other
            images, so those to come are forgotten.

    Returns:
        A line for each extra EMA that starts or is dropped, and for steps that are forgotten.

    Raises:
        CheckpointError: it is damaged, or not of this recipe's model.
    """
    metadata = read(path, state_tensors(state), group=group, optional=lambda name: name.startswith("ema_"))
    started, dropped = _changed_emas(path, state)
    for decay in started:
        reset_ema(state.extra_emas[decay], state.model)
    copy_frozen(state.model, state.emas)
    try:
        state.step, state.rolled_back = int(metadata["step"]), bool(metadata["rolled_back"])
        state.skipped_steps = {int(step) for step in metadata["skipped_steps"]}
        state.nonfinite_steps = [int(step) for step in metadata["nonfinite_steps"]]
        state.segments = tuple(Segment(int(first), int(size)) for first, size in metadata["batch_sizes"])
        saved_seed = int(metadata["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is of another version: its metadata lack {error}") from error
    notes = [f"the EMA of decay {decay} starts at the weights of step {state.step}" for decay in started]
    notes += [f"the EMA of decay {decay} is dropped" for decay in dropped]
    later = {step for step in state.skipped_steps if step > state.step}
    if seed is not None and seed != saved_seed and later:
        state.skipped_steps, state.rolled_back = state.skipped_steps - later, False
        notes.append(f"the seed changes the order: steps {min(later)} to {max(later)} are no longer skipped")
    return notes


def _changed_emas(path: Path, state: TrainState) -> tuple[list[float], list[str]]:
    """Decays of extra EMAs that only the state has, and of those that only the checkpoint has."""
    frozen = _frozen(state.model)
    one = next(name for name in state.model.state_dict() if name not in frozen)
    saved = {
        name.removeprefix("ema_").removesuffix(f".{one}")
        for name in Manifest.read(path).tensors
        if name.startswith("ema_") and name.endswith(f".{one}")
    }
    kept = {str(decay) for decay in state.extra_emas}
    return [decay for decay in state.extra_emas if str(decay) not in saved], sorted(saved - kept)


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by name, sharing its memory; frozen parameters are under `model` alone."""
    frozen = _frozen(state.model)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in state.model.state_dict().items()}
    emas = {"ema": state.ema} | {f"ema_{decay}": ema for decay, ema in state.extra_emas.items()}
    emas |= {f"posthoc_{std}": ema for std, ema in state.posthoc_emas.items()}
    for kind, ema in emas.items():
        tensors |= {f"{kind}.{name}": t.detach() for name, t in ema.state_dict().items() if name not in frozen}
    return tensors | {f"optimizer.{name}": moment for name, moment in state.optimizer.named_moments().items()}


def _frozen(model: Backbone) -> set[str]:
    """Names of a model's frozen parameters."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
