"""The figure of a study: held-out loss over images, a panel a claim and scale."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.style import DASHES, LINES, WIDTH, figure_style, to_png
from .page import Results

SKIPPED = 0.15
"""Share of the run that is not plotted: its loss is far above the rest."""
PANEL = 2.4
"""Height of a panel in inches."""


def loss_curves(results: Results) -> bytes | None:
    """The curves as a PNG, means over seeds with the range of the seeds; None without records of a pair."""
    panels = [
        (number, claim, scale)
        for number, claim in enumerate(results.study.claims, start=1)
        for scale in results.study.scales
        if sum(bool(results.of(name, scale)) for name in claim.variants()) > 1
    ]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with figure_style():
        figure = Figure(figsize=(WIDTH * columns, PANEL * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (number, claim, scale) in zip(grid, panels):
            _plot(axes, results, claim.variants(), scale)
            axes.set_title(f"claim {number}" + (f", {scale}" if len(results.study.scales) > 1 else ""))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return to_png(figure)


def _plot(axes: Axes, results: Results, variants: list[str], scale: str) -> None:
    for i, name in enumerate(variants):
        curves = [np.array([(point[1], point[3]) for point in r["val_curve"]]) for r in results.of(name, scale)]
        if not curves:
            continue
        images, losses = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        shown = images >= SKIPPED * images[-1]
        color, dashes = LINES[i % len(LINES)], DASHES[i // len(LINES) % len(DASHES)]
        axes.plot(images[shown] / 1000, losses.mean(0)[shown], color=color, linestyle=dashes, label=name)
        axes.fill_between(
            images[shown] / 1000, losses.min(0)[shown], losses.max(0)[shown], color=color, alpha=0.15, linewidth=0
        )
    axes.set_xlabel("thousand images")
    axes.set_ylabel("held-out loss")
    axes.grid(True)
    axes.legend(fontsize=7)
