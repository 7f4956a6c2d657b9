"""The command `diffusion-moe`: one function a verb, all of them thin."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .benchmarks.options import BenchOptions, What
from .config import SECTIONS, DataConfig, EvaluationConfig, to_yaml
from .conversion import ConvertOptions, to_pipeline, to_published_file
from .encoding.options import EncodeOptions
from .memory import keep_freed_memory
from .parsing import (
    find_recipe,
    make_parser,
    parse,
    read_recipe,
    recipe_arguments,
    recipe_from,
    recipe_names,
    unknown_name,
)
from .run_folder import RunFolder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from .evaluation.source import Source

USER_ERROR = 2


def say(text: str) -> None:
    """One line for the user, at once."""
    print(text, flush=True)


@dataclass(frozen=True)
class TrainOptions:
    """Where to train, and what to do with what is there."""

    output_dir: Path | None = None
    """Run folder; runs/NAME-OF-THE-RECIPE unless given. The same command on the same folder resumes."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last good checkpoint; never: refuse a folder that is not empty."""


@dataclass(frozen=True)
class SampleOptions:
    """Which images to draw and how to save them."""

    classes: str | None = None
    """Numbers or names of classes, as 3,7 or "golden retriever"; all unless given, or eight of more than twenty."""
    per_class: int = 10
    """Images of each class (of an unconditional model: images)."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture with a row a class, single pictures, or arrays `images` (uint8, NHWC) and `labels`."""
    output: Path | None = None
    """File (grid, npz) or folder (png); inside the folder's samples/ unless given."""
    vae: str | None = None
    """Hub id or folder of the AutoencoderKL that decodes latents, where the folder has none of its own."""
    prompt: str | None = None
    """A text to draw (of each, `per_class` images)."""
    prompts: Path | None = None
    """A text file of prompts, a line each."""
    negative_prompt: str | None = None
    """A text that guidance leads away from; the model's null prompt unless given."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder, where it is not where training left it."""
    height: int | None = None
    """Height of the images in pixels, any that patches fill; the model's own unless given."""
    width: int | None = None
    """Width of the images in pixels; likewise."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class is {self.per_class}; it must be positive")
        for name in ("negative_prompt", "text_encoder"):
            if getattr(self, name) is not None and self.prompt is None and self.prompts is None:
                raise ValueError(f"{name} is {getattr(self, name)}, but there is no prompt; give --prompt or --prompts")

    def chosen(self) -> list[str] | None:
        """The classes one by one."""
        return None if self.classes is None else [part.strip() for part in self.classes.strip("[] ").split(",")]


def train(arguments: Sequence[str]) -> int:
    """Train a recipe: a shipped one's name or a YAML file, with dotted overrides such as --model.num_experts 8."""
    parser = make_parser("train", train.__doc__ or "", SECTIONS)
    parser.add_argument("recipe", type=str, help="a shipped recipe (see `diffusion-moe recipes`) or a YAML file")
    parser.add_class_arguments(TrainOptions)
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe as YAML and stop")
    name, rest = _positional(parser, arguments, "recipe", "diffusion-moe train RECIPE")
    file = find_recipe(name)
    parsed = parse(parser, [name, *recipe_arguments(file), *rest])
    recipe = recipe_from(parsed)
    if parsed.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from .evaluation.preview import previews_of
    from .training.loop import NonFiniteError
    from .training.loop import train as run_training

    folder = parsed.output_dir or Path("runs") / file.stem
    preview = previews_of(recipe) if recipe.logging.sample_every else None
    try:
        outcome = run_training(recipe, folder, parsed.resume, say, preview)
    except NonFiniteError as error:
        say(f"stopped: {error}")
        return 1
    if outcome.interrupted_by is not None:
        say(f"interrupted; saved a checkpoint at step {outcome.step}. Run the same command again to go on.")
        return 128 + outcome.interrupted_by
    return 0


def sample(arguments: Sequence[str]) -> int:
    """Draw images from a run, a converted folder or a pipeline folder; settings default to the run's recipe."""
    source, options, settings = _source_options(
        "sample", sample.__doc__ or "", arguments, {"num_samples"}, SampleOptions
    )
    from .evaluation.draw import draw_samples
    from .evaluation.prompts import Asked, read_prompts

    if options.vae is not None:
        if source.vae is not None and source.latent_space is None:
            raise ValueError(f"--vae is {options.vae}, but {source.path} has a VAE of its own; leave it out")
        source = dataclasses.replace(source, vae=options.vae)
    prompts = read_prompts(options.prompt, options.prompts)
    asked = Asked(prompts, options.negative_prompt, options.text_encoder) if prompts else None
    size = (options.height, options.width)
    path = draw_samples(
        source, settings, options.chosen(), options.per_class, options.format, options.output, say, asked, size
    )
    say(f"wrote {path}")
    return 0


def convert(arguments: Sequence[str]) -> int:
    """Make a pipeline folder of a published checkpoint or a run, or the other way with --to published."""
    parser = make_parser("convert", convert.__doc__ or "")
    parser.add_argument("source", type=str, help="a published checkpoint, a folder that holds one, a hub id, or a run")
    parser.add_class_arguments(ConvertOptions)
    name, rest = _positional(parser, arguments, "source", "diffusion-moe convert SOURCE --output DIR")
    parsed = parse(parser, [name, *rest])
    options = ConvertOptions(**{field: parsed[field] for field in _fields(ConvertOptions)})
    work = to_pipeline if options.to == "diffusers" else to_published_file
    say(work(name, options))
    return 0


def encode(arguments: Sequence[str]) -> int:
    """Encode a data set's images by a VAE into a latent cache to train on; under torchrun, by several processes."""
    parser = make_parser("encode", encode.__doc__ or "")
    parser.add_argument("source", type=str, help="a folder with a sub-folder a class, or what --kind huggingface takes")
    parser.add_class_arguments(EncodeOptions)
    parser.add_class_arguments(DataConfig, skip=_NOT_OF_IMAGES)
    parser.set_defaults({"kind": "folder", "image_size": 256})
    name, rest = _positional(parser, arguments, "source", "diffusion-moe encode IMAGES --vae VAE --output CACHE")
    parsed = parse(parser, [name, *rest])
    own = {field: parsed[field] for field in _fields(EncodeOptions)}
    images = {field: parsed[field] for field in _fields(DataConfig) & (vars(parsed).keys() - own.keys())}
    from .encoding.encode import encode as run_encoding

    say(run_encoding(DataConfig(path=name, **images), EncodeOptions(**own), say))
    return 0


_NOT_OF_IMAGES = {
    *("path", "channels", "flip", "normalize", "test_fraction", "buckets"),
    *("caption_column", "text_encoder", "text_length", "text_precision"),
}
"""Fields of `DataConfig` that `encode` has no use for, or options of its own."""


def evaluate(arguments: Sequence[str]) -> int:
    """Score a trained run against real images into its evaluation.json; settings default to the run's recipe."""
    source, _, settings = _source_options("evaluate", evaluate.__doc__ or "", arguments)
    run = _run_of(source, "evaluate")
    from .evaluation.score import evaluate_run, table

    table(evaluate_run(run, settings), say)
    say(f"wrote {run.evaluation}")
    return 0


def analyze(arguments: Sequence[str]) -> int:
    """Draw a trained run's loss, and which experts serve which class and time, into its figures/."""
    source, _, settings = _source_options(
        "analyze", analyze.__doc__ or "", arguments, _fields(EvaluationConfig) - {"seed"}
    )
    run = _run_of(source, "analyze")
    from .analysis.run import draw_figures

    for path in draw_figures(run, settings.seed):
        say(f"wrote {path}")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Time the layer, a training step, sampling, products, or how cost grows: one JSON line a measurement."""
    parser = make_parser("bench", bench.__doc__ or "")
    parser.add_argument("what", type=What, help="what to time")
    parser.add_class_arguments(BenchOptions)
    what, rest = _positional(
        parser, arguments, "thing to time", "diffusion-moe bench layer|step|sample|products|scaling"
    )
    parsed = parse(parser, [what, *rest])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells standard error of every start
    from .benchmarks.cases import measure

    for record in measure(parsed.what, BenchOptions(**{name: parsed[name] for name in _fields(BenchOptions)})):
        say(json.dumps(record))
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the shipped recipes with their parameters (M of 2^20, as the papers count)."""
    parser = make_parser("recipes", recipes.__doc__ or "")
    parser.add_argument("--flops", action="store_true", help="count compute too, which takes a few seconds")
    with_flops = parse(parser, arguments).flops
    from .models.sizes import PAPER_MILLION, model_flops, model_size

    width = max(len(name) for name in recipe_names()) + 2
    say(
        f"{'recipe':{width}}{'router':10}{'total M':>10}{'activated M':>14}"
        + (f"{'GFLOPs per image and step':>28}" if with_flops else "")
    )
    for name in recipe_names():
        config = read_recipe(name).model
        size = model_size(config)
        total, activated = size.total / PAPER_MILLION, size.activated / PAPER_MILLION
        flops = f"{model_flops(config) / 1e9:28.3f}" if with_flops else ""
        say(f"{name:{width}}{config.router:10}{total:10.1f}{activated:14.1f}{flops}")
    return 0


def _positional(parser: ArgumentParser, arguments: Sequence[str], name: str, usage: str) -> tuple[str, list[str]]:
    """The verb's first argument and the others; --help is answered here."""
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help()
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"the {name} is missing; usage: {usage} [options]")
    return arguments[0], list(arguments[1:])


def _source_options(
    verb: str, description: str, arguments: Sequence[str], unheeded: Set[str] = frozenset(), options: type | None = None
) -> tuple[Source, Any, EvaluationConfig]:
    """The folder, the verb's own options, and sampling settings (options but for the unheeded ones)."""
    parser = make_parser(verb, description)
    parser.add_argument("source", type=str, help="folder of a run, or one that `diffusion-moe convert` made")
    parser.add_class_arguments(EvaluationConfig, skip=set(unheeded))
    if options is not None:
        parser.add_class_arguments(options)
    name, rest = _positional(parser, arguments, "folder", f"diffusion-moe {verb} FOLDER")
    from .evaluation.source import read_source

    source = read_source(Path(name))
    unconditional = source.config.num_classes == 0 and source.config.text_dim == 0
    defaults = vars(source.settings) | ({"guidance_scale": 1.0} if unconditional else {})
    parser.set_defaults({key: value for key, value in defaults.items() if key in parser.get_defaults()})
    parsed = vars(parse(parser, [name, *rest]))
    settings = EvaluationConfig(**{key: parsed.get(key, value) for key, value in defaults.items()})
    if unconditional and settings.guidance_scale != 1:
        raise ValueError(f"guidance_scale is {settings.guidance_scale}, but the model is unconditional; leave it out")
    return source, options and options(**{name: parsed[name] for name in _fields(options)}), settings


def _run_of(source: Source, verb: str) -> RunFolder:
    run = RunFolder(source.path)
    if not run.recipe.is_file():
        raise ValueError(
            f"{source.path} is no run, so it has no data of its own to {verb} with; give the folder of a run"
        )
    return run


def _fields(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample,
    "convert": convert,
    "encode": encode,
    "evaluate": evaluate,
    "analyze": analyze,
    "bench": bench,
    "recipes": recipes,
}


COMPUTING = {"train", "sample", "encode", "evaluate", "analyze", "bench"}
"""Verbs that run a model."""


def usage() -> str:
    """What `diffusion-moe --help` prints."""
    lines = [f"  {name:10}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: diffusion-moe VERB ...",
            "",
            "Diffusion transformers with mixtures of experts: train, sample, score.",
            "",
            *lines,
            "",
            "`diffusion-moe VERB --help` explains every option of a verb.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        from . import __version__

        print(f"diffusion-moe {__version__}")
        return 0
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if arguments[0] in COMPUTING:
        keep_freed_memory()
    try:
        if arguments[0] not in VERBS:
            raise ValueError(unknown_name(arguments[0], list(VERBS)).replace("is no", "is no verb"))
        return VERBS[arguments[0]](arguments[1:])
    except ValueError as error:
        if os.environ.get("DIFFUSION_MOE_TRACEBACK"):
            raise
        print(f"diffusion-moe: {error}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("diffusion-moe: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"diffusion-moe: {error.strerror or error}: {error.filename}", file=sys.stderr)
        return 1
