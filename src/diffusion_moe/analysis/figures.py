"""Figures of one run: its loss, and which experts serve which class and which time.

Shape suffixes: L MoE layers, S solver steps, K classes, E experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ..diffusion.solvers import euler, even_times
from ..evaluation.generate import class_schedule
from ..models import Backbone
from ..randomness import normal
from .records import record_routing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS, IMAGES_PER_CLASS = 20, 20


class ExpertUse(NamedTuple):
    """How often each expert served a token, by layer, time and class."""

    share_LSKE: np.ndarray
    """Average number of times that a token of class k at step s was served by expert e of layer l."""
    times_S: np.ndarray
    """Time t at each step (0 is noise, 1 is data)."""


@torch.no_grad()
def expert_use(model: Backbone, seed: int = 0) -> ExpertUse:
    """Sample without guidance, record the routers, and average over the images of each class."""
    config = model.settings
    K = max(1, config.num_classes)
    labels = class_schedule(IMAGES_PER_CLASS * K, config.num_classes)
    samples = torch.arange(IMAGES_PER_CLASS * K)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = normal(seed, "sample", 0, samples.to(model.device), shape)
    classes = None if labels is None else labels.to(model.device)
    times = even_times(STEPS)
    shares = []
    with record_routing(model) as record:

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            out = model(x, t.to(x.device), classes).sample[:, : config.in_channels]
            counts_LBE = record.counts_LBE().float().cpu()
            record.clear()
            # Class k has the images k, k + K, ...
            shares.append(counts_LBE.unflatten(1, (IMAGES_PER_CLASS, K)).mean(1))
            return out

        euler(velocity, noise, times)
    tokens = (config.sample_size // config.patch_size) ** 2
    return ExpertUse((torch.stack(shares, dim=1) / tokens).numpy(), times[:-1].numpy())


def draw_experts(use: ExpertUse, class_names: list[str], path: Path) -> None:
    """One row a layer: experts against classes, and experts against time."""
    L, _, K, E = use.share_LSKE.shape
    figure, axes = plt.subplots(L, 2, figsize=(10, 0.6 + (0.9 + 0.22 * E) * L), squeeze=False, layout="constrained")
    top = max(use.share_LSKE.mean(1).max(), use.share_LSKE.mean(2).max())
    image = None
    for layer, (by_class, by_time) in enumerate(axes):
        image = by_class.imshow(use.share_LSKE[layer].mean(0).T, aspect="auto", cmap="magma", vmin=0, vmax=top)
        by_time.imshow(
            use.share_LSKE[layer].mean(1).T,
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=top,
            extent=(0, 1, E - 0.5, -0.5),
        )
        by_class.set_ylabel(f"MoE layer {layer + 1}\nexpert")
        by_class.set_xticks(range(K), class_names if K <= 20 else [""] * K)
        for axis in (by_class, by_time):
            axis.set_yticks(range(E) if E <= 16 else range(0, E, 8))
    axes[0, 0].set_title("by class", fontsize=11)
    axes[0, 1].set_title("by time", fontsize=11)
    axes[-1, 0].set_xlabel("class")
    axes[-1, 1].set_xlabel("t (0 is noise, 1 is data)")
    figure.colorbar(image, ax=axes, label="times a token is served by the expert", shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_loss(metrics: Path, path: Path) -> None:
    """The training loss against steps, as logged and smoothed."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, loss = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
    window = max(1, len(loss) // 20)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, loss, color="#b8c4d6", linewidth=0.8, label="logged steps")
    axis.plot(steps[window - 1 :], smooth, color="#c2410c", linewidth=1.8, label=f"mean of {window}")
    axis.set(xlabel="step", ylabel="velocity loss", xlim=(0, None))
    axis.set_ylim(smooth.min() * 0.9, np.quantile(loss, 0.99) * 1.05)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
