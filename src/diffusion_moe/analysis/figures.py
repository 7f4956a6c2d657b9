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

from ..config import EvaluationConfig, Solver
from ..evaluation.generate import DDPM_STEPS, class_schedule, generate
from ..models import Backbone, DiTOutput
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


def expert_use(model: Backbone, seed: int = 0) -> ExpertUse:
    """Sample without guidance, record the routers, and average over the images of each class."""
    config = model.settings
    K = max(1, config.num_classes)
    count = IMAGES_PER_CLASS * K
    solver: Solver = "euler" if config.process == "flow" else "ddim"
    settings = EvaluationConfig(batch_size=count, solver=solver, steps=STEPS, guidance_scale=1.0, seed=seed)
    shares: list[Tensor] = []
    times: list[float] = []

    def note(model: Backbone, inputs: tuple[Tensor, Tensor, Tensor | None], out: DiTOutput) -> None:
        counts_LBE = record.counts_LBE().float().cpu()
        record.clear()
        tokens_L = torch.tensor([report.num_tokens / count for report in out.routing])
        # Class k has the images k, k + K, ...
        shares.append(counts_LBE.unflatten(1, (IMAGES_PER_CLASS, K)).mean(1) / tokens_L[:, None, None])
        t = float(inputs[1])
        times.append(t if config.process == "flow" else 1 - t / DDPM_STEPS)

    with record_routing(model) as record:
        hook = model.register_forward_hook(note)
        try:
            generate(model, class_schedule(count, config.num_classes), count, settings)
        finally:
            hook.remove()
    return ExpertUse(torch.stack(shares, dim=1).numpy(), np.array(times))


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
