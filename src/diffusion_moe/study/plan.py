"""The plan of a study: variants, parameters, compute and the estimated time, before any run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..config import Recipe
from ..counts import model_flops, model_size, training_flops
from ..log import Log
from .definition import Study
from .matching import MATCHED
from .records import Record, current


def print_plan(study: Study, records: Sequence[Record], gflops: float, log: Log) -> None:
    """Log a line a variant and scale, and the time that is left.

    Time is that of finished runs of the variant, else the FLOPs of training at the assumed speed.

    Args:
        study: the study.
        records: of its file.
        gflops: assumed speed in billions of operations a second.
        log: receives the lines.
    """
    done, left = current(study, records), 0.0
    width = max(len(name) for name in study.variants) + 2
    columns = f"{'activated':>12} {'':16}{'total':>12}{'MFLOP/image':>13}{'minutes':>9}{'done':>6}"
    log(f"{'variant':{width}}{'scale':8}{columns}  widths")
    for (name, scale), recipe in study.recipes.items():
        size, wanted = model_size(recipe.model), model_size(study.recipes[study.fields.reference, scale].model)
        flops = model_flops(recipe.model).total
        finished = [r["seconds"] for r in done if (r["variant"], r["scale"]) == (name, scale)]
        seconds = statistics.fmean(finished) if finished else _assumed_seconds(recipe, gflops)
        left += seconds * (len(study.fields.seeds) - len(finished))
        share = f"{size.activated / wanted.activated - 1:+.1%}" + (" unequal" if study.variants[name].unequal else "")
        sizes = f"{size.activated:12,.0f} {share:16}{size.total:12,.0f}{flops / 1e6:13.1f}"
        log(f"{name:{width}}{scale:8}{sizes}{seconds / 60:9.1f}{len(finished):6}  {_widths(recipe)}")
    runs = len(list(study.runs()))
    log(f"{runs} runs, {len(done)} done; {left / 3600:.1f} hours left, at {gflops:g} GFLOP/s where none is measured")


def _assumed_seconds(recipe: Recipe, gflops: float) -> float:
    images = recipe.training.steps * recipe.training.batch_size
    return 3 * training_flops(recipe) * images / (1e9 * gflops)


def _widths(recipe: Recipe) -> str:
    names = [field.removeprefix("model.") for field in MATCHED]
    widths = {name: getattr(recipe.model, name) for name in names}
    if recipe.model.router == "dense":
        widths = {"mlp": recipe.model.mlp_width}
    return ", ".join(f"{name} {value}" for name, value in widths.items() if value is not None)
