"""The verbs that compare images with real ones: `evaluate`, `stats` and `sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..config import DataConfig, EvaluationConfig, build, find_recipe
from ..config.reading import merge, read_sections
from ..evaluation.grid import AXES, make_points, read_grid
from ..evaluation.options import EvaluateOptions, ImagesOptions, StatsOptions, SweepOptions
from ..run_folder import RunFolder
from ..sampling.source import is_model, read_source
from .command_line import CommandLine
from .folder import FOLDER, is_unconditional, read_folder
from .output import torchrun_log
from .parsing import parse


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run, a converted or pipeline folder, a folder of images or an .npz against real images.

    Images of a folder or an .npz take --reference, --extractor, --inception, --output, --num_samples and --batch_size.
    """
    path = _path(arguments)
    if path is not None and (path.suffix == ".npz" or path.is_dir()) and not is_model(path):
        first = ("images", "a folder of images or an .npz")
        given = parse(CommandLine("evaluate", evaluate.__doc__, (ImagesOptions,), first=first), arguments)
        images = given.options(ImagesOptions)
        from ..evaluation.evaluate import evaluate_images

        with torchrun_log() as log:
            evaluate_images(path, images, log)
        return 0
    source, options, settings = read_folder(evaluate, arguments, EvaluateOptions)
    source = dataclasses.replace(source.with_vae(options.vae), weights=options.weights)
    from ..evaluation.evaluate import evaluate_model
    from ..sampling.generate import with_precision
    from ..sampling.sampler import load_sampler

    with torchrun_log() as log:
        with_precision(settings, log)
        evaluate_model(load_sampler(source, settings), options, log)
    return 0


def stats(arguments: Sequence[str]) -> int:
    """Make statistics of real images for `evaluate`: of a recipe's or run's data, a folder of images or an .npz."""
    path = _path(arguments)
    is_run = path is not None and RunFolder(path).recipe.is_file()
    has_recipe = path is None or is_run or not (path.is_dir() or path.suffix == ".npz")
    sections = {"data": DataConfig} if has_recipe else {}
    first = ("data", "a recipe's name or file, a run, a folder of images, or an .npz")
    given = parse(CommandLine("stats", stats.__doc__, (StatsOptions,), sections, first), arguments)
    data = None
    if has_recipe:
        file = RunFolder(Path(given.first)).recipe if is_run else find_recipe(given.first)
        data = build(DataConfig, merge(read_sections(file), given.sections).get("data", {}), "data.")
    options = given.options(StatsOptions)
    from ..evaluation.make_statistics import make_statistics

    with torchrun_log() as log:
        make_statistics(given.first, data, options, log)
    return 0


def sweep(arguments: Sequence[str]) -> int:
    """Score a grid of guidance, weights, steps, solvers and thresholds: a table, a CSV and figures."""
    own = (SweepOptions, EvaluationConfig)
    line = CommandLine("sweep", sweep.__doc__, own, first=FOLDER, hidden={EvaluationConfig: AXES})
    given = parse(line, arguments)
    source = read_source(Path(given.first))
    grid = given.options(SweepOptions).grid
    lists, others = ({}, {}) if grid is None else read_grid(grid)
    sweeps = {name: others.pop(name) for name in SweepOptions.__dataclass_fields__ if name in others}
    options = given.options(SweepOptions, sweeps)
    settings = given.options(EvaluationConfig, vars(source.settings) | others)
    if is_unconditional(source):
        settings = dataclasses.replace(settings, guidance_scale=1.0)
    from ..evaluation.sweep import sweep as run_sweep
    from ..sampling.generate import with_precision

    with torchrun_log() as log:
        points = make_points(options, lists, with_precision(settings, log))
        run_sweep(source.with_vae(options.vae), points, options, log)
    return 0


def _path(arguments: Sequence[str]) -> Path | None:
    """The first argument as a path, if there is one."""
    return Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
