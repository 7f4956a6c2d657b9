"""The verbs that take a recipe: `train` and `plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..config import SECTIONS, InitConfig, Recipe, build, find_recipe, to_yaml
from ..config.reading import Sections, build_recipe, merge, read_sections
from ..planning.options import PlanOptions
from ..run_folder import Resume, RunFolder
from .command_line import CommandLine
from .output import log
from .parsing import parse

if TYPE_CHECKING:
    from ..initialization import PretrainedSource

RECIPE = ("recipe", "a shipped recipe (see `diffusion-moe recipes`) or a YAML file")


@dataclass(frozen=True)
class TrainOptions:
    """The run folder, and the handling of a run that it holds."""

    output_dir: Path | None = None
    """Run folder; runs/NAME-OF-THE-RECIPE unless given. The same command on the same folder resumes."""
    resume: Resume = "auto"
    """auto: resume from the last good checkpoint; never: refuse a folder that is not empty; changed: resume with
    another recipe (schedule, batch size, EMAs, seed, data of the same shape), and keep the old one."""
    print_config: bool = False
    """Print the whole recipe as YAML and stop."""


class _Chosen(NamedTuple):
    recipe: Recipe
    pretrained: PretrainedSource | None
    """The checkpoint to start from, if there is one."""


def train(arguments: Sequence[str]) -> int:
    """Train a recipe: a shipped one's name or a YAML file, with dotted overrides such as --model.num_experts 8.

    Options override the recipe. The defaults below are those of fields that neither sets.
    """
    line = CommandLine("train", train.__doc__, (TrainOptions,), SECTIONS, RECIPE)
    given = parse(line, arguments)
    file, options = find_recipe(given.first), given.options(TrainOptions)
    folder = options.output_dir or Path("runs") / file.stem
    recipe, pretrained = _choose(file, given.sections, RunFolder(folder))
    if options.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from ..sampling.preview import previews_of
    from ..training.loop import NonFiniteError
    from ..training.loop import train as run_training

    preview = previews_of(recipe) if recipe.logging.sample_every else None
    load = None if pretrained is None else pretrained.load
    try:
        outcome = run_training(recipe, folder, options.resume, log, preview, load)
    except NonFiniteError:
        return 1
    return 0 if outcome.interrupted_by is None else 128 + outcome.interrupted_by


def plan(arguments: Sequence[str]) -> int:
    """Predict what a recipe needs before it runs: parameters, compute, memory of each process, disk and time.

    Options override the recipe. The defaults below are those of fields that neither sets.
    """
    given = parse(CommandLine("plan", plan.__doc__, (PlanOptions,), SECTIONS, RECIPE), arguments)
    file, options = find_recipe(given.first), given.options(PlanOptions)
    recipe = _choose(file, given.sections).recipe
    from ..planning.plan import make_plan
    from ..planning.table import print_plan

    made = make_plan(recipe, options)
    if options.json:
        log(json.dumps(made.record(), indent=2))
    else:
        print_plan(made, file.stem, options, log)
    return 0


def _choose(file: Path, options: Sections, run: RunFolder | None = None) -> _Chosen:
    """The recipe of a file and options; a model field that neither sets is that of init.from_checkpoint."""
    sections = merge(read_sections(file), options)
    init = build(InitConfig, sections.get("init", {}), "init.")
    if init.from_checkpoint is None:
        return _Chosen(build_recipe(sections), None)
    from ..initialization import PretrainedSource, model_settings

    pretrained = PretrainedSource(init)
    return _Chosen(build_recipe(merge({"model": model_settings(pretrained, run)}, sections)), pretrained)
