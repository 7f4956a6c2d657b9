"""Losses of a run: those that training logged, and the trained model's loss on held-out images at each time.

Shape suffixes: W logged steps, I images, S bins of time, L MoE layers, E experts, B images of a pass.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import Recipe
from ..data import ImageDataset
from ..diffusion.ddpm import DDPM_STEPS
from ..models import Backbone
from ..randomness import normal
from ..text import TextFeatures
from ..training.loss import loss_at
from .routing_metrics import evenly_spaced

HELD_OUT_IMAGES, HELD_OUT_BINS, PASS = 256, 10, 256


class Curves(NamedTuple):
    """Logs of a run. Missing values are NaN."""

    run: str
    about: str
    """Batch size and seed."""
    steps_W: np.ndarray
    loss_W: np.ndarray
    imbalance_W: np.ndarray
    """Load of the busiest expert over the mean load, averaged over layers; 1 is even."""
    imbalance_WL: np.ndarray
    """Imbalance of each layer; no columns where it was not logged."""
    loss_WS: np.ndarray
    """Loss by bin of t, noise first; no columns where it was not logged."""


class HeldOut(NamedTuple):
    """Loss of the averaged model on held-out images, without label dropout."""

    run: str
    seed: int
    """Seed of the noise."""
    loss_IS: np.ndarray
    """Loss of each image at the middle of each of S equal bins of t, from noise to data."""
    labels_I: np.ndarray
    training_steps: int | None

    @property
    def times_S(self) -> np.ndarray:
        S = self.loss_IS.shape[1]
        return (np.arange(S) + 0.5) / S


def read_curves(metrics: Path, run: str, about: str = "", is_ddpm: bool = False) -> Curves | None:
    """Curves of a `metrics.jsonl`; None if it is missing or has no step. Incomplete lines are skipped."""
    rows = []
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    if not rows:
        return None
    loss_WS = _columns(rows, r"loss_t(\d\.\d+)")
    return Curves(
        run,
        about,
        np.array([row["step"] for row in rows]),
        np.array([_number(row.get("loss")) for row in rows]),
        np.array([_number(row.get("imbalance")) for row in rows]),
        _columns(rows, r"moe_(\d+)/load_max"),
        loss_WS[:, ::-1] if is_ddpm else loss_WS,  # ddpm logs times as steps from data to noise
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _columns(rows: list[dict[str, Any]], pattern: str) -> np.ndarray:
    """Values of the keys that match a pattern, a column each, sorted by the number in the key."""
    found = {key: match for row in rows for key in row if (match := re.fullmatch(pattern, key))}
    keys = sorted(found, key=lambda key: float(found[key][1]))
    return np.array([[_number(row.get(key)) for key in keys] for row in rows]).reshape(len(rows), len(keys))


def held_out_rows(dataset: ImageDataset) -> list[int]:
    """Indices of the held-out images for the loss."""
    return evenly_spaced(len(dataset), HELD_OUT_IMAGES)


@torch.no_grad()
def held_out_loss(
    model: Backbone,
    recipe: Recipe,
    dataset: ImageDataset,
    run: str,
    training_steps: int | None,
    seed: int = 0,
    text: TextFeatures | None = None,
) -> HeldOut:
    """The training loss of some of the data set's images at the middle of each bin of t, in float32.

    The noise of an image is a function of (seed, bin, image), so that models are compared on the same noise.

    Args:
        model: in eval mode.
        dataset: held-out images, of which `held_out_rows` are used.
        text: features of their captions, for a model with text.
    """
    recipe = replace(recipe, training=replace(recipe.training, precision="fp32"))
    batch = dataset.read(held_out_rows(dataset))
    images, device, columns = batch.images, model.device, []
    for s in range(HELD_OUT_BINS):
        time, losses = (s + 0.5) / HELD_OUT_BINS, []
        t = round((1 - time) * DDPM_STEPS) if recipe.model.process == "ddpm" else time
        for rows in torch.arange(len(images)).split(PASS):
            noise = normal(seed, "held_out", s, rows, tuple(images.shape[1:])).to(device)
            classes = batch.labels[rows].to(device) if recipe.model.num_classes else None
            texts, t_B = None if text is None else text.rows(rows).to(device), torch.full((len(rows),), t).to(device)
            parts = loss_at(model, recipe, images[rows].to(device), classes, noise, t_B, texts)
            losses.append(parts.diffusion_B.cpu())
        columns.append(torch.cat(losses))
    return HeldOut(run, seed, torch.stack(columns, dim=1).double().numpy(), batch.labels.numpy(), training_steps)
