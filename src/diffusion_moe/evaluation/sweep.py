"""Scores over a grid of sampling settings, each point once, against one reference."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..distributed import from_main, is_main
from ..log import Log
from ..run_folder import write_atomically
from ..sampling.generate import check_solver
from ..sampling.source import Loaded, Source
from .evaluate import Result, number_of, own_data, score_model, scorer_of, summary
from .features import fingerprint
from .grid import Point
from .options import SweepOptions
from .prompts import PromptSource, prompts_of
from .scorer import Scorer

FOLDER = "sweep"
"""In a run or model folder."""
SCORES = (
    "overall",
    "seen",
    "held_out",
    "fid",
    "sfid",
    "inception_score",
    "kid",
    "frechet",
    "kernel_distance",
    "precision",
    "recall",
    "recognised",
    "nearest_neighbour",
)
SETTINGS = ("weights", "solver", "steps", "guidance_interval", "threshold_scale", "guidance_scale")
COSTS = ("function_evaluations", "average_capacity", "seconds_per_image")
RECORDED = ("num_samples", "seed", "ema_decay", "training_steps", "images_sha256")


@dataclass(frozen=True)
class Outcome:
    """A point of the grid and its scores."""

    point: Point
    result: Result


def sweep(source: Source, points: Sequence[Point], options: SweepOptions, log: Log) -> list[Outcome]:
    """Score every point that is not scored yet, then write the table, `sweep.csv` and figures.

    Returns:
        On the main process the points' scores in their order; an empty list elsewhere.

    Raises:
        ValueError: a point does not fit the model, or reference and images do not fit; nothing is generated then.
    """
    source.check_images()
    for point in points:
        check_point(source, point)
    shown = prompts_of(source, points[0].settings, options, own_data(source, options), log)
    folder = options.output or source.path / FOLDER
    scorer: Scorer | None = None
    outcomes = []
    loaded: Loaded | None = None
    current = source
    digest = ""
    for i, point in enumerate(points, 1):
        if loaded is None or point.weights != current.weights:
            current = replace(source, weights=point.weights)
            loaded = current.load()
            digest = fingerprint(loaded.model) if is_main() else ""
        if scorer is None:
            scorer = scorer_of(source, loaded, point.settings, options, shown, folder, log)
        path = _file(folder, point, digest, scorer, shown)
        done = from_main(_read(path))
        if done is None:
            log(f"{i} of {len(points)}: {point.title()}")
            done = score_model(current, loaded, point.settings, scorer, path, log, shown)
        if is_main():
            assert done is not None
            outcomes.append(Outcome(point, done))
    if is_main():
        _show(outcomes, folder, log)
    return outcomes


def check_point(source: Source, point: Point) -> None:
    """Whether a point fits the model, before anything is generated.

    Raises:
        ValueError: it does not.
    """
    check_solver(source.config, point.settings)
    scale = point.settings.threshold_scale
    if scale != 1 and not (source.config.rule and source.config.rule.has_thresholds):
        raise ValueError(f"threshold_scale is {scale}, but only diffmoe routers have thresholds; leave it at 1")
    if source.config.num_classes == 0 and source.config.text_dim == 0 and point.settings.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale is {point.settings.guidance_scale}, but the model is unconditional; leave it out"
        )
    replace(source, weights=point.weights).origin()


def _file(folder: Path, point: Point, model: str, scorer: Scorer, shown: PromptSource | None) -> Path:
    """Where a point's scores lie: another model, setting, extractor, reference or prompt has another name."""
    about = {
        "model": model,
        "weights": point.weights,
        "settings": asdict(point.settings),
        "extractor": asdict(scorer.extractor.identity),
        "reference": scorer.reference_sha256,
    } | ({} if shown is None else shown.identity())
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "points" / f"{digest}.json"


def _read(path: Path) -> Result | None:
    """Scores of a point that is done; a file that cannot be read counts as none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _show(outcomes: list[Outcome], folder: Path, log: Log) -> None:
    from .plot_sweep import draw_sweep

    for line in table(outcomes):
        log(line)
    log(f"all: {summary(outcomes[0].result).split('; ')[0]}; {summary(outcomes[0].result).split('; ')[-1]}")
    for warning in dict.fromkeys(line for outcome in outcomes for line in outcome.result["warnings"]):
        log(f"warning: {warning}")
    write_atomically(folder / "sweep.csv", to_csv(outcomes))
    for path in [folder / "sweep.csv", *draw_sweep(outcomes, folder)]:
        log(f"wrote {path}")


def row(outcome: Outcome) -> dict[str, Any]:
    """One line of the table: settings, costs, scores, and what they depend on."""
    result = outcome.result
    values = {key: result.get(key) for key in (*SETTINGS, *COSTS)}
    values |= {key: number_of(result[key]) for key in SCORES if key in result}
    values |= {key: result.get(key) for key in RECORDED}
    values["guidance_interval"] = "{:g}:{:g}".format(*result["guidance_interval"])
    return values | {
        "extractor": result["extractor"]["name"],
        "extractor_weights": result["extractor"]["weights"],
        "reference": result["reference"]["name"],
        "reference_sha256": result["reference"]["sha256"],
        "warnings": "; ".join(result["warnings"]),
    }


def to_csv(outcomes: list[Outcome]) -> str:
    """All rows with a header."""
    rows = [row(outcome) for outcome in outcomes]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(outcomes: list[Outcome]) -> list[str]:
    """The settings that vary, the costs and the scores, as lines of even width."""
    rows = [row(outcome) for outcome in outcomes]
    varying = [key for key in SETTINGS if len({str(values[key]) for values in rows}) > 1] or ["guidance_scale"]
    keys = [*varying, *COSTS, *(key for key in SCORES if key in rows[0])]
    keys = [key for key in keys if any(values[key] is not None for values in rows)]
    cells = [[_heading(key) for key in keys], *([_cell(values[key]) for key in keys] for values in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells]


def _heading(key: str) -> str:
    short = {
        "function_evaluations": "evaluations",
        "average_capacity": "capacity",
        "seconds_per_image": "s/image",
        "guidance_scale": "guidance",
        "guidance_interval": "interval",
        "threshold_scale": "thresholds",
        "inception_score": "IS",
        "fid": "FID",
        "sfid": "sFID",
        "kid": "KID",
        "kernel_distance": "kernel",
        "nearest_neighbour": "nearest",
        "held_out": "held out",
    }
    return short.get(key, key)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
