"""Scores of images against real ones, written with all that they depend on."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import DataConfig
from ..log import Log
from ..run_folder import EVALUATION, RunFolder, replace_atomically, write_atomically
from ..sampling.sample import settings_name, weights_name
from ..sampling.sampler import Sampler
from ..sampling.source import Source
from .extract_features import extract_features
from .images import GeneratedImages, Images, open_images
from .metrics import NEIGHBOURS
from .options import EvaluateOptions, ImagesOptions, SweepOptions
from .prompts import PromptSource, check_text_options, text_prompts
from .report import Result, summary
from .scorer import ClassifierScorer, Scorer, make_scorer
from .shapes_scorer import Questions, ShapesScorer, shape_questions

FOLDER = "evaluations"
"""Folder in a run or model folder: scores other than a run's own."""


def evaluate_model(sampler: Sampler, options: EvaluateOptions, log: Log) -> Path | None:
    """Generate images, score them and write the scores; other processes than the main one help and return None.

    Raises:
        ValueError: model, prompts, reference or output do not fit.
    """
    prompts = prompts_for(sampler, options, log)
    folder = sampler.source.path / FOLDER if options.output is None else options.output.parent
    scorer = scorer_for(sampler, options, prompts, folder, log)
    path = options.output or _scores_path(sampler, scorer, None if options.prompts is None else prompts)
    return _report(score_model(sampler, scorer, path, log, prompts), scorer, path, log)


def prompts_for(sampler: Sampler, options: EvaluateOptions | SweepOptions, log: Log) -> PromptSource | None:
    """The prompts of the images to score; None for a model without text."""
    own = _own_data(sampler.source, options)
    check_text_options(sampler.source, options)
    if not sampler.source.config.text_dim:
        return None
    if own is not None and own.kind == "shapes":
        return shape_questions(sampler, options, log)
    return text_prompts(sampler, options, log)


def scorer_for(
    sampler: Sampler, options: EvaluateOptions | SweepOptions, prompts: PromptSource | None, folder: Path, log: Log
) -> Scorer:
    """The scorer of a model's images; see `make_scorer`."""
    size = sampler.image_size
    if isinstance(prompts, Questions) and options.extractor is None and options.inception is None:
        return ShapesScorer(prompts, size, sampler.settings.seed)
    own = _own_data(sampler.source, options) if prompts is None else None  # a classifier knows classes, no prompts
    return make_scorer(options, own, size, folder, log)


def _own_data(source: Source, options: EvaluateOptions | SweepOptions) -> DataConfig | None:
    """The data that a run's images are scored by without a reference; None with one, or for latents."""
    if options.reference is not None or source.recipe is None or source.vae is not None:
        return None
    return source.recipe.data


def score_model(
    sampler: Sampler, scorer: Scorer, path: Path, log: Log, prompts: PromptSource | None = None
) -> Result | None:
    """The scores of a model's images, written to `path`; None on other processes than the main one."""
    return _score(GeneratedImages(sampler, prompts), scorer, sampler.settings.batch_size, path, log)


def _score(images: Images, scorer: Scorer, batch_size: int, path: Path, log: Log) -> Result | None:
    if images.count <= NEIGHBOURS:
        raise ValueError(f"scores need more than {NEIGHBOURS} images; {images.name} gives {images.count}")
    with extract_features(images, scorer.extractor, batch_size, path.parent, log) as features:
        if features is None:
            return None
        result = scorer.scores(features, images.labels) | images.metadata(features.stats)
        gallery = scorer.gallery(features)
        if gallery is not None:
            with replace_atomically(_gallery_path(path)) as file:
                gallery.save(file, format="PNG")
        write_atomically(path, json.dumps(result, indent=2) + "\n")
        return result


def evaluate_images(source: Path, options: ImagesOptions, log: Log) -> Path | None:
    """Score the images of a folder or an `.npz` and write the scores.

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
    path = options.output or source.with_name(f"{source.stem}.{scorer.name()}.json")
    return _report(_score(images, scorer, options.batch_size, path, log), scorer, path, log)


def _report(result: Result | None, scorer: Scorer, path: Path, log: Log) -> Path | None:
    """Log the scores as a table, what they depend on, warnings and files; None on other processes than the main one."""
    if result is None:
        return None
    warnings = [f"warning: {line}" for line in result["warnings"]]
    files = [path, _gallery_path(path)] if isinstance(scorer, ShapesScorer) else [path]
    for line in [*scorer.table(result), summary(result), *warnings, *(f"wrote {file}" for file in files)]:
        log(line)
    return path


def _scores_path(sampler: Sampler, scorer: Scorer, given: PromptSource | None) -> Path:
    """File of the scores: its name distinguishes settings, extractors, references and given prompts."""
    weights = weights_name(sampler.source.weights)
    if isinstance(scorer, ClassifierScorer | ShapesScorer):
        own = RunFolder(sampler.source.path).evaluation
        return own.with_stem("-".join([own.stem, *weights]))
    parts = [scorer.name(), f"n{sampler.settings.num_samples}", *weights]
    parts += [] if given is None else [f"prompts{given.sha256[:8]}"]
    return sampler.source.path / FOLDER / f"{'-'.join([*parts, settings_name(sampler)])}.json"


def _gallery_path(scores: Path) -> Path:
    """File of the images beside scores: prompts.png beside a run's own, else the scores' name with .png."""
    return scores.with_name("prompts.png") if scores.name == EVALUATION else scores.with_suffix(".png")
