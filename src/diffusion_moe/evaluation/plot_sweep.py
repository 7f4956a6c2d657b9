"""Figures of a sweep: quality against guidance, against average capacity and against time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .grid import AXES
from .report import Result, number_of


class Figure(NamedTuple):
    """Axis and lines of a figure."""

    name: str
    key: str
    """The horizontal axis, as a key of the scores."""
    label: str
    along: tuple[str, ...]
    """The first of these settings that varies changes along a line; lines differ in the others."""


FIGURES = (
    Figure("guidance.png", "guidance_scale", "guidance scale", ("guidance_scale",)),
    Figure("capacity.png", "average_capacity", "average capacity (routed experts a token)", AXES[-2:]),
    Figure("time.png", "seconds_per_image", "seconds an image, generation alone", ("steps", *AXES[-2:])),
)
LEGEND_INSIDE = 6
"""Lines whose names fit inside the figure."""
LABELS = {
    "weights": "{}",
    "solver": "{}",
    "steps": "{} steps",
    "guidance_interval": "t {0[0]:g} to {0[1]:g}",
    "threshold_scale": "thresholds × {:g}",
    "guidance_scale": "guidance {:g}",
}
"""Names of lines by the setting that differs between them."""
QUALITIES = {"overall": "share of prompts that are right", "fid": "FID", "frechet": "Fréchet distance"}
"""Scores for the vertical axis, of which the first known one is plotted, and their names."""


def plot_sweep(results: list[Result], folder: Path) -> list[Path]:
    """Write a figure for each horizontal axis along which the points differ; return the paths."""
    paths = []
    for figure in FIGURES:
        if len({result.get(figure.key) for result in results} - {None}) > 1:
            _plot(results, figure, folder / figure.name)
            paths.append(folder / figure.name)
    return paths


def _plot(results: list[Result], figure: Figure, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = results[0]
    quality = next(key for key in QUALITIES if key in first)
    lines = lines_of(results, next((key for key in figure.along if _varies(results, key)), figure.along[0]))
    many = len(lines) > LEGEND_INSIDE
    canvas, axes = plt.subplots(figsize=(8.4 if many else 6.4, 4), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("viridis")([i / max(1, len(lines) - 1) * 0.9 for i in range(len(lines))]))
    for title, members in lines.items():
        known = [result for result in members if result.get(figure.key) is not None]
        x, y = [result[figure.key] for result in known], [number_of(result[quality]) for result in known]
        axes.plot(x, y, "o-", label=title, markersize=4)
    axes.set_xlabel(figure.label)
    axes.set_ylabel(QUALITIES[quality])
    extractor = first["extractor"]
    axes.set_title(f"{first['num_samples']:,} samples, {extractor['name']} {extractor['weights']}", fontsize=9)
    axes.grid(alpha=0.3)
    if many:
        canvas.legend(loc="outside right upper", fontsize=7)
    elif len(lines) > 1:
        axes.legend(fontsize=7)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def lines_of(results: list[Result], along: str) -> dict[str, list[Result]]:
    """Scores whose settings are equal except `along`, in its order, under a title of what differs between lines."""
    varying = [key for key in AXES if key != along and _varies(results, key)]
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result[along] or 0):  # the adaptive solver has no steps
        values = {key: "adaptive" if result[key] is None else result[key] for key in varying}
        title = ", ".join(LABELS[key].format(value) for key, value in values.items())
        lines.setdefault(title, []).append(result)
    return dict(sorted(lines.items()))


def _varies(results: list[Result], key: str) -> bool:
    return len({str(result[key]) for result in results}) > 1
