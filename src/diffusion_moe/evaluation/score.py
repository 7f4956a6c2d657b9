"""Scores of images against real ones: computed, recorded with all they depend on, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import DataConfig, EvaluationConfig
from ..run_folder import RunFolder, write_atomically
from .collect import Say, collected
from .draw import settings_name
from .generate import check_solver, provenance
from .images import GeneratedImages, Images, open_images
from .judge import Judge, OwnJudge, make_judge
from .metrics import NEIGHBOURS
from .options import EvaluateOptions, ImagesOptions
from .source import Loaded, Source

FOLDER = "evaluations"
"""In a run or model folder: scores other than a run's own."""
Result = dict[str, Any]


def evaluate_model(source: Source, settings: EvaluationConfig, options: EvaluateOptions, say: Say) -> Path | None:
    """Generate images, score them and write the record; other processes than the main one help and return None.

    Raises:
        ValueError: model, settings, reference or output do not fit.
    """
    source.check_images()
    check_solver(source.config, settings)
    loaded = source.load()
    beside = source.path / FOLDER if options.output is None else options.output.parent
    judge = make_judge(options, own_data(source), GeneratedImages(loaded, settings, "").size, beside, say)
    path = options.output or _place(source, settings, judge)
    result = score_model(source, loaded, settings, judge, path, say)
    if result is not None:
        tell(result, say)
        say(f"wrote {path}")
    return path if result is not None else None


def own_data(source: Source) -> DataConfig | None:
    """The data of a run's recipe, if its model generates such images itself; else None."""
    run = RunFolder(source.path)
    return run.read_recipe().data if run.recipe.is_file() and source.vae is None else None


def score_model(
    source: Source, loaded: Loaded, settings: EvaluationConfig, judge: Judge, path: Path, say: Say
) -> Result | None:
    """The scores of a loaded model's images, written to `path`; None on other processes than the main one."""
    images = GeneratedImages(loaded, settings, str(source.path))
    _check_count(images)
    with collected(images, judge.extractor, settings.batch_size, path.parent, say) as found:
        if found is None:
            return None
        pools = source.config.router == "diffmoe" and source.config.inference_pool == "batch"
        result = (
            judge.scores(found, images.labels)
            | provenance(settings, found.usage)
            | ({"batch_size": settings.batch_size} if pools else {})  # images then depend on their batch
            | {"weights": source.weights}
            | source.origin()
        )
        return _write(result, path)


def evaluate_images(source: Path, options: ImagesOptions, say: Say) -> Path | None:
    """Score the images of a folder or an `.npz` and write the record.

    Raises:
        ValueError: images and reference do not fit.
    """
    if options.reference is None:
        raise ValueError(
            f"{source} is no model (it has no recipe.yaml, model_index.json or config.json); if it holds images, give "
            "--reference FILE to compare them with, as made by `diffusion-moe stats DATA`"
        )
    judge = make_judge(options, None, open_images(source).size, source.parent, say)
    images = open_images(source, judge.extractor.channels)
    if options.num_samples is not None:
        if options.num_samples > images.count:
            raise ValueError(f"num_samples is {options.num_samples}, but {source} holds {images.count} images")
        images.count = options.num_samples
    _check_count(images)
    path = options.output or source.with_name(f"{source.stem}.{_short(judge)}.json")
    with collected(images, judge.extractor, options.batch_size, path.parent, say) as found:
        if found is None:
            return None
        result = _write(judge.scores(found, None) | {"images": str(source)}, path)
    tell(result, say)
    say(f"wrote {path}")
    return path


def _check_count(images: Images) -> None:
    if images.count <= NEIGHBOURS:
        raise ValueError(f"scores need more than {NEIGHBOURS} images; {images.name} gives {images.count}")


def _write(result: Result, path: Path) -> Result:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def _place(source: Source, settings: EvaluationConfig, judge: Judge) -> Path:
    """Where scores go unless told otherwise: names tell settings, extractors and references apart."""
    if isinstance(judge, OwnJudge):
        return RunFolder(source.path).evaluation
    parts = [_short(judge), f"n{settings.num_samples}", *([] if source.weights == "ema" else [source.weights])]
    name = "-".join([*parts, settings_name(settings, source.origin().get("training_steps"))])
    return source.path / FOLDER / f"{name}.json"


def _short(judge: Judge) -> str:
    return f"{judge.extractor.identity.name.rstrip('/').split('/')[-1]}-{judge.reference.sha256[:8]}"


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


def tell(result: Result, say: Say) -> None:
    """The scores as a small table, generated beside real where both are known, then what they depend on."""
    say(f"{'':40}{'generated':>12}" + (f"{'real':>12}" if "recognised_real" in result else ""))
    for key, (title, form) in TITLES.items():
        if key in result:
            values = [result[key], *([result[f"{key}_real"]] if f"{key}_real" in result else [])]
            say(f"{title:40}" + "".join(f"{'-' if v is None else form.format(v):>12}" for v in values))
    say(summary(result))
    for line in result["warnings"]:
        say(f"warning: {line}")


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
