"""The verbs that measure models: `bench` and `recipes`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..benchmarks.options import BenchOptions, What, check_old_words
from ..config import read_recipe, recipe_names
from .command_line import CommandLine
from .output import log
from .parsing import parse


@dataclass(frozen=True)
class RecipesOptions:
    """The table."""

    flops: bool = False
    """Count compute too."""


def bench(arguments: Sequence[str]) -> int:
    """Time the layer, a step, sampling, matmuls or the growth of cost, or list waits for the GPU, as JSON lines."""
    check_old_words(arguments)
    choices = get_args(What)
    first = ("subject", f"what to measure: {', '.join(choices)}")
    given = parse(CommandLine("bench", bench.__doc__, (BenchOptions,), first=first), arguments)
    if given.first not in choices:
        raise ValueError(f"the subject is {given.first}; choose one of {', '.join(choices)}")
    options = given.options(BenchOptions)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes to standard error at every start
    from ..benchmarks.cases import measure

    for record in measure(given.first, options):  # type: ignore[arg-type]
        log(json.dumps(record))
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the shipped recipes with their parameters (M of 2^20, as the papers count)."""
    line = CommandLine("recipes", recipes.__doc__, (RecipesOptions,))
    options = parse(line, arguments).options(RecipesOptions)
    from ..counts import PAPER_MILLION, model_flops, model_size

    width = max(len(name) for name in recipe_names()) + 2
    heading = f"{'recipe':{width}}{'router':10}{'total M':>10}{'activated M':>14}"
    log(heading + (f"{'GFLOPs per image and step':>28}" if options.flops else ""))
    for name in recipe_names():
        config = read_recipe(name).model
        size = model_size(config)
        total, activated = size.total / PAPER_MILLION, size.activated / PAPER_MILLION
        flops = f"{model_flops(config).total / 1e9:28.3f}" if options.flops else ""
        log(f"{name:{width}}{config.router:10}{total:10.1f}{activated:14.1f}{flops}")
    return 0
