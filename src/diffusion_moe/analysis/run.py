"""All figures of a run."""

from __future__ import annotations

from pathlib import Path

from ..data import load_dataset
from ..evaluation.source import read_source
from ..moe import routers_of
from ..run_folder import RunFolder
from .figures import draw_experts, draw_loss, expert_use


def draw_figures(run: RunFolder, seed: int) -> list[Path]:
    """Write the run's figures and return their paths."""
    recipe = run.read_recipe()
    model = read_source(run.path).load().model
    run.figures.mkdir(exist_ok=True)
    paths = [run.figures / "loss.png"]
    draw_loss(run.metrics, paths[0])
    if routers_of(model):
        paths.append(run.figures / "experts.png")
        names = load_dataset(recipe.data, "train").class_names if recipe.model.num_classes else ["all"]
        draw_experts(expert_use(model, seed), names, paths[1])
    return paths
