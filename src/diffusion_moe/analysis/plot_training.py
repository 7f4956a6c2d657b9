"""Figures of training: loss against steps and against time, and load balance.

Shape suffixes: W logged steps, S bins of time, L MoE layers.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from .figure_notes import held_out_note
from .findings import Findings
from .losses import Curves
from .routing_metrics import evenly_spaced, moving_average
from .style import LINES, Panel, legend_above, line, new_axes, new_figure

SHOWN_LAYERS = 6
"""Most MoE layers in a figure with a part for each."""


def training_loss(findings: Findings) -> Panel:
    """Logged and smoothed loss of every run."""
    title = "Training loss"
    if not any(np.isfinite(curves.loss_W).any() for curves in findings.curves):
        return Panel(title, "No training loss was logged beside the model (metrics.jsonl).")
    figure, axes = new_axes(3.4)
    smoothed = [_smoothed(axes, curves, curves.loss_W, i, curves.run) for i, curves in enumerate(findings.curves)]
    low = min(values.min() for values in smoothed)
    high = max(np.nanquantile(curves.loss_W, 0.98) for curves in findings.curves)
    axes.set(xlabel="training step", ylabel=f"{findings.loss} loss (mean squared error)", xlim=(0, None))
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.grid(True)
    if len(findings.curves) > 1:
        legend_above(axes)
    caption = (
        "Loss of the model in training (not of the averaged weights), "
        f"{'caption' if findings.model.text_dim else 'label'} dropout included: thin as logged, thick "
        "the mean of the last twentieth of the logged steps. The highest 2 % may be above the figure. "
        f"{'; '.join(curves.about for curves in findings.curves)}."
    )
    return Panel(title, caption, figure)


def loss_by_time(findings: Findings) -> Panel:
    """Held-out loss of the trained model at each noise level."""
    title = "Held-out loss at each noise level"
    if not findings.held_out:
        return Panel(title, " ".join(findings.missing))
    figure, axes = new_axes(3.0)
    for i, run in enumerate(findings.held_out):
        curve = line(i)
        mean, error = run.loss_IS.mean(0), run.loss_IS.std(0, ddof=1) / np.sqrt(len(run.loss_IS))
        axes.plot(run.times_S, mean, marker="o", ms=3, label=run.run, **curve)
        axes.fill_between(run.times_S, mean - error, mean + error, color=curve["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="t (0 is noise, 1 is data)", xlim=(0, 1), ylabel=f"{findings.loss} loss")
    axes.grid(True)
    paired = ""
    if len(findings.held_out) > 1:
        legend_above(axes)
        paired = "Differences between the models are surer than the bands say, as all see the same images and noise. "
    caption = (
        "Training loss of the averaged model by time, mean over images with a band of one standard error over images. "
        f"{paired}{held_out_note(findings, findings.held_out)}"
    )
    return Panel(title, caption, figure)


def logged_loss_by_time(findings: Findings) -> Panel:
    """Training loss at each noise level, where the run logged it."""
    title = "Training loss by noise level"
    curves = [curves for curves in findings.curves if curves.loss_WS.shape[1]]
    if not curves:
        return Panel(title, "")
    figure = new_figure(2.9 * len(curves))
    for axes, run in zip(np.atleast_1d(figure.subplots(len(curves), sharex=True)), curves):
        bins = run.loss_WS.shape[1]
        for i, s in enumerate(evenly_spaced(bins, len(LINES))):
            _smoothed(axes, run, run.loss_WS[:, s], i, f"t from {s / bins:.2g} to {(s + 1) / bins:.2g}")
        axes.set(ylabel=f"{findings.loss} loss", title=run.run if len(curves) > 1 else "")
        axes.grid(True)
        legend_above(axes)
    axes.set_xlabel("training step")
    return Panel(title, f"As logged, smoothed; t = 0 is noise. {'; '.join(run.about for run in curves)}.", figure)


def balance(findings: Findings) -> Panel:
    """Load balance of the experts in each logged training batch."""
    title = "Load balance over training"
    if findings.sampling is None:
        return Panel(title, "")
    curves = [c for c in findings.curves if np.isfinite(c.imbalance_W).any() or np.isfinite(c.imbalance_WL).any()]
    if not curves:
        return Panel(title, "No imbalance was logged.")
    figure, axes = new_axes(2.8)
    own = curves[0]
    if len(curves) == 1 and own.imbalance_WL.shape[1]:
        for i, layer in enumerate(evenly_spaced(own.imbalance_WL.shape[1], SHOWN_LAYERS)):
            _smoothed(axes, own, own.imbalance_WL[:, layer], i, f"MoE layer {layer + 1}")
    else:
        for i, run in enumerate(curves):
            _smoothed(axes, run, run.imbalance_W, i, run.run)
    axes.axhline(1, color="#7f7f7f", linewidth=0.8, ls=":")
    axes.set(xlabel="training step", ylabel="busiest expert / mean load", xlim=(0, None))
    axes.set_ylim(0.95, max(axes.get_ylim()[1], 1.2))
    axes.grid(True)
    if len(axes.get_lines()) > 3:
        legend_above(axes)
    caption = (
        "Tokens of the busiest expert over the mean of all, in the training batch of each logged step; 1 is even. Thin "
        f"as logged, thick smoothed{'' if own.imbalance_WL.shape[1] else ', averaged over MoE layers'}. "
        f"{'; '.join(run.about for run in curves)}."
    )
    return Panel(title, caption, figure)


def _smoothed(axes: Axes, run: Curves, values_W: np.ndarray, i: int, label: str) -> np.ndarray:
    """Plot a curve thin as logged and thick as a moving average, and return the average."""
    known = np.isfinite(values_W)
    steps, values = run.steps_W[known], values_W[known]
    window, curve = max(1, len(values) // 20), line(i)
    smooth = moving_average(values, window)
    axes.plot(steps, values, color=curve["color"], linewidth=0.6, alpha=0.35)
    # Each mean is plotted at the last of its steps, so that it includes no later step.
    axes.plot(steps[window - 1 :], smooth, label=label, **curve)
    return smooth
