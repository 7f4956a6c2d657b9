"""Scores of images against real ones: computed, recorded with all they depend on, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import DataConfig, EvaluationConfig
from ..log import Log
from ..run_folder import EVALUATION, RunFolder, replace_atomically, write_atomically
from ..sampling.generate import check_solver, provenance
from ..sampling.sample import settings_name, weights_name
from ..sampling.source import Loaded, Source
from ..shapes.report import as_table
from .extract_features import collected
from .images import GeneratedImages, Images, open_images
from .metrics import NEIGHBOURS
from .options import EvaluateOptions, ImagesOptions, SweepOptions
from .prompts import PromptSource, Questions, prompts_of
from .scorer import ClassifierScorer, Scorer, make_scorer
from .shapes_scorer import ShapesScorer

FOLDER = "evaluations"
"""In a run or model folder: scores other than a run's own."""
Result = dict[str, Any]


def evaluate_model(source: Source, settings: EvaluationConfig, options: EvaluateOptions, log: Log) -> Path | None:
    """Generate images, score them and write the record; other processes than the main one help and return None.

    Raises:
        ValueError: model, settings, reference or output do not fit.
    """
    source.check_images()
    source.origin()  # there are such weights
    check_solver(source.config, settings)
    shown = prompts_of(source, settings, options, own_data(source, options), log)
    loaded = source.load()
    beside = source.path / FOLDER if options.output is None else options.output.parent
    scorer = scorer_of(source, loaded, settings, options, shown, beside, log)
    path = options.output or _place(source, settings, scorer, None if options.prompts is None else shown)
    result = score_model(source, loaded, settings, scorer, path, log, shown)
    if result is not None:
        tell(result, log)
        for file in (path, _picture(path)):
            if file.is_file():
                log(f"wrote {file}")
    return path if result is not None else None


def own_data(source: Source, options: EvaluateOptions | SweepOptions) -> DataConfig | None:
    """The data of a run that judges its images itself; None with a reference, or of a model that draws latents."""
    run = RunFolder(source.path)
    judges = options.reference is None and run.recipe.is_file() and source.vae is None
    return run.read_recipe().data if judges else None


def scorer_of(
    source: Source,
    loaded: Loaded,
    settings: EvaluationConfig,
    options: EvaluateOptions | SweepOptions,
    shown: PromptSource | None,
    beside: Path,
    log: Log,
) -> Scorer:
    """Who judges a model's images.

    Args:
        shown: what they show. beside: where unfinished work is kept.

    Raises:
        ValueError: see `make_scorer`.
    """
    size = GeneratedImages(loaded, settings, "").size
    if isinstance(shown, Questions) and options.extractor is None and options.inception is None:
        return ShapesScorer(shown, size, settings.seed)
    own = None if shown is not None else own_data(source, options)  # a classifier knows classes, no prompts
    return make_scorer(options, own, size, beside, log)


def score_model(
    source: Source,
    loaded: Loaded,
    settings: EvaluationConfig,
    scorer: Scorer,
    path: Path,
    log: Log,
    shown: PromptSource | None = None,
) -> Result | None:
    """The scores of a loaded model's images, written to `path`; None on other processes than the main one.

    Args:
        shown: their prompts, of a model with text.
    """
    images = GeneratedImages(loaded, settings, str(source.path), shown)
    _check_count(images)
    with collected(images, scorer.extractor, settings.batch_size, path.parent, log) as found:
        if found is None:
            return None
        result = (
            scorer.scores(found, images.labels)
            | provenance(settings, found.usage)
            | (
                {"batch_size": settings.batch_size} if source.config.pools_batch else {}
            )  # images then depend on their batch
            | ({} if shown is None else shown.record())
            | {"weights": source.weights}
            | source.origin()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = scorer.picture(found)
        if picture is not None:
            with replace_atomically(_picture(path)) as file:
                picture.save(file, format="PNG")
        return _write(result, path)


def _picture(scores: Path) -> Path:
    """Where the picture that belongs to scores lies: in a run's own folder prompts.png, elsewhere under their name."""
    return scores.with_name("prompts.png") if scores.name == EVALUATION else scores.with_suffix(".png")


def evaluate_images(source: Path, options: ImagesOptions, log: Log) -> Path | None:
    """Score the images of a folder or an `.npz` and write the record.

    Raises:
        ValueError: images and reference do not fit.
    """
    if options.reference is None:
        raise ValueError(
            f"{source} is no model (it has no recipe.yaml, model_index.json or config.json); if it holds images, give "
            "--reference FILE to compare them with, as made by `diffusion-moe stats DATA`"
        )
    scorer = make_scorer(options, None, open_images(source).size, source.parent, log)
    images = open_images(source, scorer.extractor.channels)
    for line in images.notes:
        log(line)
    if options.num_samples is not None:
        if options.num_samples > images.count:
            raise ValueError(f"num_samples is {options.num_samples}, but {source} holds {images.count} images")
        images.count = options.num_samples
    _check_count(images)
    path = options.output or source.with_name(f"{source.stem}.{_short(scorer)}.json")
    with collected(images, scorer.extractor, options.batch_size, path.parent, log) as found:
        if found is None:
            return None
        result = _write(scorer.scores(found, None) | {"images": str(source)}, path)
    tell(result, log)
    log(f"wrote {path}")
    return path


def _check_count(images: Images) -> None:
    if images.count <= NEIGHBOURS:
        raise ValueError(f"scores need more than {NEIGHBOURS} images; {images.name} gives {images.count}")


def _write(result: Result, path: Path) -> Result:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def _place(source: Source, settings: EvaluationConfig, scorer: Scorer, asked: PromptSource | None) -> Path:
    """Where scores go unless told otherwise: names tell settings, extractors, references and given prompts apart."""
    weights = weights_name(source.weights)
    if isinstance(scorer, ClassifierScorer | ShapesScorer):
        own = RunFolder(source.path).evaluation
        return own.with_stem("-".join([own.stem, *weights]))
    parts = [_short(scorer), f"n{settings.num_samples}", *weights]
    parts += [] if asked is None else [f"prompts{asked.sha256[:8]}"]
    name = "-".join([*parts, settings_name(settings, source.origin().get("training_steps"))])
    return source.path / FOLDER / f"{name}.json"


def _short(scorer: Scorer) -> str:
    return f"{scorer.extractor.identity.name.rstrip('/').split('/')[-1]}-{scorer.reference_sha256[:8]}"


TITLES = {
    "recognised": ("recognised as their class", "{:.1%}"),
    "frechet": ("Fréchet distance to the real images", "{:.3f}"),
    "nearest_neighbour": ("distance to the nearest training image", "{:.3f}"),
    "fid": ("FID", "{:.3f}"),
    "sfid": ("sFID", "{:.3f}"),
    "inception_score": ("Inception score", "{:.2f}"),
    "kid": ("KID", "{:.6f}"),
    "kernel_distance": ("kernel distance", "{:.6f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
}
"""Scores with their names and forms, in the order in which they are shown."""


def tell(result: Result, log: Log) -> None:
    """The scores as a small table, generated beside real where both are known, then what they depend on."""
    if "categories" in result:
        for line in as_table(result).splitlines():
            log(line)
        _tell_what_they_depend_on(result, log)
        return
    log(f"{'':40}{'generated':>12}" + (f"{'real':>12}" if "recognised_real" in result else ""))
    for key, (title, form) in TITLES.items():
        if key in result:
            values = [result[key], *([result[f"{key}_real"]] if f"{key}_real" in result else [])]
            log(f"{title:40}" + "".join(f"{'-' if v is None else form.format(v):>12}" for v in values))
    _tell_what_they_depend_on(result, log)


def _tell_what_they_depend_on(result: Result, log: Log) -> None:
    log(summary(result))
    for line in result["warnings"]:
        log(f"warning: {line}")


def number_of(score: Any) -> Any:
    """A score as one number: of coloured shapes the share that is right, without its chance."""
    return score["score"] if isinstance(score, dict) else score


def summary(result: Result) -> str:
    """What the numbers depend on, in one line."""
    extractor = result["extractor"]
    parts = [f"{result['num_samples']} samples"]
    if "solver" in result:
        steps = "" if result["steps"] is None else f" {result['steps']} steps"
        low, high = result["guidance_interval"]
        interval = "" if (low, high) == (0, 1) else f" on t {low:g} to {high:g}"
        average = result.get("ema_decay")
        parts += [
            f"{result['solver']}{steps}, {result['function_evaluations']:g} evaluations",
            f"guidance {result['guidance_scale']:g}{interval}",
            f"weights {result['weights']}" + ("" if average is None else f" (decay {average:g})"),
        ]
    return "; ".join([*parts, f"{extractor['name']} {extractor['weights']}"])
