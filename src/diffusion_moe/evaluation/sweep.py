"""Scores over a grid of sampling settings, each point once, against one reference."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..distributed import from_main, is_main
from ..log import Log
from ..routing_rules import names_with_thresholds
from ..run_folder import write_atomically
from ..sampling.generate import check_solver
from ..sampling.loading import weights_metadata
from ..sampling.sampler import load_sampler
from ..sampling.source import Source
from .evaluate import prompts_for, score_model, scorer_for
from .features import digest_of, fingerprint
from .grid import AXES, SweepPoint
from .options import SweepOptions
from .plot_sweep import plot_sweep
from .prompts import PromptSource
from .report import TITLES, Result, number_of, summary
from .scorer import Scorer

FOLDER = "sweep"
"""Folder in a run or model folder."""
SCORES = ("overall", "seen", "held_out", *TITLES)
HEADINGS = {"function_evaluations": "evaluations", "average_capacity": "capacity", "seconds_per_image": "s/image"}
HEADINGS |= {"guidance_scale": "guidance", "guidance_interval": "interval", "threshold_scale": "thresholds"}
HEADINGS |= {"inception_score": "IS", "fid": "FID", "sfid": "sFID", "kid": "KID"}
HEADINGS |= {"kernel_distance": "kernel", "nearest_neighbour": "nearest", "held_out": "held out"}
"""Short names of columns, for the logged table."""
COSTS = ("function_evaluations", "average_capacity", "seconds_per_image")
RECORDED = ("num_samples", "seed", "ema_decay", "training_steps", "images_sha256")


def sweep(source: Source, points: Sequence[SweepPoint], options: SweepOptions, log: Log) -> list[Result]:
    """Score every point that is not scored yet, then write the table, `sweep.csv` and figures.

    Returns:
        On the main process the points' scores in their order; an empty list elsewhere.

    Raises:
        ValueError: a point does not fit the model, or reference and images do not fit; nothing is generated then.
    """
    source.check_images()
    for point in points:
        check_point(source, point)
    sampler = load_sampler(replace(source, weights=points[0].weights), points[0].settings)
    prompts = prompts_for(sampler, options, log)
    folder = options.output or source.path / FOLDER
    scorer = scorer_for(sampler, options, prompts, folder, log)
    digest, scored = fingerprint(sampler.model), []
    for i, point in enumerate(points, 1):
        if point.weights != sampler.source.weights:
            sampler = load_sampler(replace(source, weights=point.weights), point.settings)
            digest = fingerprint(sampler.model)
        sampler = replace(sampler, settings=point.settings)
        path = _scores_path(folder, point, digest, scorer, prompts)
        result = from_main(_read(path))
        if result is None:
            log(f"{i} of {len(points)}: {point.title()}")
            result = score_model(sampler, scorer, path, log, prompts)
        if is_main():
            assert result is not None
            scored.append(result)
    if is_main():
        _report(scored, folder, log)
    return scored


def check_point(source: Source, point: SweepPoint) -> None:
    """Raise a ValueError for a point that does not fit the model, before anything is generated."""
    check_solver(source.config, point.settings)
    scale = point.settings.threshold_scale
    if scale != 1 and not (source.config.rule and source.config.rule.has_thresholds):
        raise ValueError(
            f"threshold_scale is {scale}, but only {names_with_thresholds()} routers have thresholds; set it to 1"
        )
    if source.config.num_classes == 0 and source.config.text_dim == 0 and point.settings.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale is {point.settings.guidance_scale}, but the model is unconditional; remove the option"
        )
    weights_metadata(replace(source, weights=point.weights))  # raises if there are no such weights


def _scores_path(folder: Path, point: SweepPoint, model: str, scorer: Scorer, prompts: PromptSource | None) -> Path:
    """File of a point's scores: its name distinguishes models, settings, extractors, references and prompts."""
    identity = {
        "model": model,
        "weights": point.weights,
        "settings": asdict(point.settings),
        "extractor": asdict(scorer.extractor.identity),
        "reference": scorer.reference_sha256,
    } | ({} if prompts is None else prompts.identity())
    return folder / "points" / f"{digest_of(identity)[:12]}.json"


def _read(path: Path) -> Result | None:
    """Scores of a point that is done; None where the file cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _report(results: list[Result], folder: Path, log: Log) -> None:
    rows = [row(result) for result in results]
    for line in table(rows):
        log(line)
    common = summary(results[0]).split("; ")
    log(f"all: {common[0]}; {common[-1]}")
    for warning in dict.fromkeys(line for result in results for line in result["warnings"]):
        log(f"warning: {warning}")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "sweep.csv", text.getvalue())
    for path in [folder / "sweep.csv", *plot_sweep(results, folder)]:
        log(f"wrote {path}")


def row(result: Result) -> dict[str, Any]:
    """One line of the table: settings, costs, scores, and what they depend on."""
    values = {key: result.get(key) for key in (*AXES, *COSTS)}
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


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The settings that vary, the costs and the scores, as lines of equal width."""
    varying = [key for key in AXES if len({str(values[key]) for values in rows}) > 1] or ["guidance_scale"]
    keys = [*varying, *COSTS, *(key for key in SCORES if key in rows[0])]
    keys = [key for key in keys if any(values[key] is not None for values in rows)]
    cells = [[HEADINGS.get(key, key) for key in keys], *([_cell(values[key]) for key in keys] for values in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
