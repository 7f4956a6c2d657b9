"""The command `ema`: EMAs of any width, made of a run's snapshots after training.

Post-hoc EMA of EDM2 (arXiv 2312.02696): the average of the wanted width is the linear combination of the snapshots
whose weights of the training steps come nearest to it. Equations and algorithms are numbered as in its published code.

Shape suffix: S snapshots, each a pair of a step and the width of an EMA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .config.fields import EMA_STD
from .log import Log
from .models import load_model
from .run_folder import DATA, ORIGIN, RunFolder, ema_name
from .sampling.source import read_source
from .storage import CheckpointError, checkpoint_path, checkpoints_in, export, step_of
from .training.ema import power_exponent
from .training.export import save_model_folder


@dataclass(frozen=True)
class EmaOptions:
    """EMAs to make."""

    std: str
    """Widths of the EMAs, as 0.03,0.05,0.1: the standard deviation of the averaged steps, over all steps."""

    def __post_init__(self) -> None:
        for part in self.std.split(","):
            try:
                fits = EMA_STD.holds(float(part))
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f"std is {self.std}; {EMA_STD.remedy}, several with commas")

    @property
    def stds(self) -> list[float]:
        """The widths one by one."""
        return [float(part) for part in self.std.split(",")]


class Snapshot(NamedTuple):
    """One EMA at one step."""

    step: int
    std: float


def make_emas(path: Path, options: EmaOptions, log: Log) -> list[Path]:
    """Write an EMA model of each width, at the step of the newest snapshot, into the run's folder.

    Returns:
        Their folders.

    Raises:
        ValueError: the folder holds no finished run, or no readable snapshots.
    """
    if read_source(path).recipe is None:
        raise ValueError(f"{path} is a model and no run, so it has no snapshots; give the folder of a run")
    run = RunFolder(path)
    kept, steps = run.read_recipe().training.posthoc_ema_stds, [step_of(each) for each in checkpoints_in(run.snapshots)]
    if not kept or not steps:
        raise ValueError(f"{path} has no snapshots; train with --training.posthoc_ema_stds=[0.05,0.1]")
    snapshots = [Snapshot(step, std) for step in sorted(steps) for std in kept]
    folders = []
    for std in options.stds:
        wanted = Snapshot(max(steps), std)
        weights_S = combination(snapshots, wanted)
        model, average = load_model(run.model), _combined(run, snapshots, weights_S)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():  # what was frozen is in no snapshot
                if name in average:
                    tensor.copy_(average[name])
        name = ema_name(f"std{std}")
        folder = run.ema_model(name)
        origin = {"training_steps": wanted.step, "ema_decay": None, "ema_std": std}
        save_model_folder(model, folder, {ORIGIN: origin, DATA: json.loads((run.model / DATA).read_text())})
        error = distance(snapshots, weights_S, wanted)
        log(f"wrote {folder} of {len(steps)} snapshots ({100 * error:.1f} % off the wanted average); --weights {name}")
        folders.append(folder)
    return folders


def _combined(run: RunFolder, snapshots: Sequence[Snapshot], weights_S: np.ndarray) -> dict[str, Tensor]:
    """Weighted sum of the snapshots' tensors, in float64."""
    total: dict[str, Tensor] = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "snapshot.safetensors"
        for snapshot, weight in zip(snapshots, weights_S.tolist()):
            try:
                export(checkpoint_path(run.snapshots, snapshot.step), f"posthoc_{snapshot.std}.", file)
            except CheckpointError as error:
                raise ValueError(f"{error}; remove this snapshot to make EMAs of the others") from error
            for name, tensor in load_file(file).items():
                if tensor.is_floating_point():
                    total.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64)).add_(tensor, alpha=weight)
    return total


def inner_product(a: Snapshot, b: Snapshot) -> float:
    """Integral of the product of two power functions, each with integral 1 over 0 to its step."""
    # EDM2 eq. 151, with p(t) = (gamma + 1) / T (t / T)^gamma (eq. 121)
    early, late = sorted((a, b))
    g_early, g_late = power_exponent(early.std), power_exponent(late.std)
    ratio = (early.step / late.step) ** g_late
    return (g_early + 1) * (g_late + 1) / (g_early + g_late + 1) * ratio / late.step


def combination(snapshots: Sequence[Snapshot], wanted: Snapshot) -> np.ndarray:
    """Weights of the snapshots, (S,), whose combination comes nearest to the wanted average by least squares."""
    # EDM2 algorithm 3. The sum is made 1, so that weights that did not change in training are kept.
    gram_SS = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    weights_S = np.linalg.solve(gram_SS, [inner_product(a, wanted) for a in snapshots])
    return weights_S / weights_S.sum()


def distance(snapshots: Sequence[Snapshot], weights_S: np.ndarray, wanted: Snapshot) -> float:
    """Root mean square between the combination's and the wanted average's weights of the steps, over the latter's."""
    gram_SS = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    with_wanted_S = np.array([inner_product(a, wanted) for a in snapshots])
    norm = inner_product(wanted, wanted)
    square = norm - 2 * weights_S @ with_wanted_S + weights_S @ gram_SS @ weights_S
    return float(np.sqrt(max(0.0, square) / norm))
