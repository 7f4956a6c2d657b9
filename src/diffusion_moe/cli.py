"""The command `diffusion-moe`: one function a verb, all of them thin."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .allocator import keep_compiled_products, keep_freed_memory
from .benchmarks.options import BenchOptions, What
from .config import SECTIONS, DataConfig, EvaluationConfig, InitConfig, to_yaml
from .conversion import ConvertOptions, export_reference_checkpoint, to_pipeline
from .encoding.options import EncodeOptions
from .evaluation.options import EvaluateOptions, ImagesOptions, StatsOptions, SweepOptions, Weights
from .inspection.options import InspectOptions
from .parsing import (
    find_recipe,
    make_parser,
    parse,
    peek,
    read_recipe,
    read_yaml,
    recipe_arguments,
    recipe_from,
    recipe_names,
    unknown_name,
)
from .planning.options import PlanOptions
from .run_folder import Resume, RunFolder
from .shapes.text_encoder.options import TextEncoderOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from .initialization import PretrainedModel
    from .sampling.source import Source

USER_ERROR = 2
Section = TypeVar("Section")


def log(text: str) -> None:
    """One line for the user, at once."""
    print(text, flush=True)


@dataclass(frozen=True)
class TrainOptions:
    """Where to train, and what to do with what is there."""

    output_dir: Path | None = None
    """Run folder; runs/NAME-OF-THE-RECIPE unless given. The same command on the same folder resumes."""
    resume: Resume = "auto"
    """auto: go on from the last good checkpoint; never: refuse a folder that is not empty; changed: go on from it by
    another recipe (schedule, batch size, averages, seed, data of the same shape), and keep the old one."""


@dataclass(frozen=True)
class SampleOptions:
    """Which images to draw and how to save them."""

    classes: str | None = None
    """Names or numbers of classes, as "golden retriever,7"; #7 is number 7, name:7 the class named 7. All unless given,
    or eight of more than twenty."""
    per_class: int = 10
    """Images of each class (of an unconditional model: images)."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture with a row a class, single pictures, or arrays `images` (uint8, NHWC) and `labels`."""
    weights: Weights = "ema"
    """A run's averaged weights (ema), those of its newest checkpoint that are not averaged (model), or a further
    average (training.extra_ema_decays) by its decay, as 0.999."""
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
    given = [*recipe_arguments(file), *rest]
    first = peek(parser, [name, *given])
    folder = first.output_dir or Path("runs") / file.stem
    point, options = _starting_point(first, RunFolder(folder))
    parsed = parse(parser, [name, *options, *given])
    recipe = recipe_from(parsed)
    if parsed.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from .sampling.preview import previews_of
    from .training.loop import NonFiniteError
    from .training.loop import train as run_training

    preview = previews_of(recipe) if recipe.logging.sample_every else None
    try:
        outcome = run_training(recipe, folder, parsed.resume, log, preview, None if point is None else point.origin)
    except NonFiniteError:
        return 1
    return 0 if outcome.interrupted_by is None else 128 + outcome.interrupted_by


def plan(arguments: Sequence[str]) -> int:
    """Say what a recipe takes before it runs: parameters, compute, memory of each process, disk and time."""
    parser = make_parser("plan", plan.__doc__ or "", SECTIONS)
    parser.add_argument("recipe", type=str, help="a shipped recipe (see `diffusion-moe recipes`) or a YAML file")
    parser.add_class_arguments(PlanOptions)
    name, rest = _positional(parser, arguments, "recipe", "diffusion-moe plan RECIPE")
    given = [*recipe_arguments(find_recipe(name)), *rest]
    _, options = _starting_point(peek(parser, [name, *given]))
    parsed = parse(parser, [name, *options, *given])
    own = PlanOptions(**{field: parsed[field] for field in _fields(PlanOptions)})
    from .planning.plan import make_plan
    from .planning.table import print_plan

    made = make_plan(recipe_from(parsed), own)
    if own.json:
        log(json.dumps(made.record(), indent=2))
    else:
        print_plan(made, find_recipe(name).stem, own, log)
    return 0


def sample(arguments: Sequence[str]) -> int:
    """Draw images from a run, a converted folder or a pipeline folder; settings default to the run's recipe."""
    source, options, settings = _source_options(
        "sample", sample.__doc__ or "", arguments, {"num_samples"}, SampleOptions
    )
    from .sampling.generate import with_precision
    from .sampling.prompts import PromptRequest, read_prompts
    from .sampling.sample import generate_images

    source = dataclasses.replace(source.with_vae(options.vae), weights=options.weights)
    prompts = read_prompts(options.prompt, options.prompts)
    asked = PromptRequest(prompts, options.negative_prompt, options.text_encoder) if prompts else None
    size = (options.height, options.width)
    with_precision(settings, log)
    path = generate_images(
        source, settings, options.chosen(), options.per_class, options.format, options.output, log, asked, size
    )
    log(f"wrote {path}")
    return 0


def convert(arguments: Sequence[str]) -> int:
    """Make a pipeline folder of a published checkpoint or a run, or the other way with --to published."""
    parser = make_parser("convert", convert.__doc__ or "")
    parser.add_argument("source", type=str, help="a published checkpoint, a folder that holds one, a hub id, or a run")
    parser.add_class_arguments(ConvertOptions)
    name, rest = _positional(parser, arguments, "source", "diffusion-moe convert SOURCE --output DIR")
    parsed = parse(parser, [name, *rest])
    options = ConvertOptions(**{field: parsed[field] for field in _fields(ConvertOptions)})
    work = to_pipeline if options.to == "diffusers" else export_reference_checkpoint
    log(work(name, options))
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """Look at images before training on them: classes, splits, sizes, unreadable files, copies, what is left out."""
    parser = make_parser("inspect", inspect.__doc__ or "", {"data": DataConfig})
    parser.add_argument("path", type=str, help="the images, as data.path; a folder unless --data.kind says otherwise")
    parser.add_class_arguments(InspectOptions)
    usual = read_yaml(find_recipe("image-folder"))["data"]
    parser.set_defaults({f"data.{name}": value for name, value in usual.items()})
    name, rest = _positional(parser, arguments, "path", "diffusion-moe inspect PATH")
    if any(argument.split("=")[0] == "--data.path" for argument in rest):
        raise ValueError(f"--data.path is given beside {name}; give the images once")
    parsed = parse(parser, [name, f"--data.path={name}", *rest])
    from .inspection.inspect import inspect as run_inspection

    run_inspection(parsed.data, _of(InspectOptions, parsed), log)
    return 0


def encode(arguments: Sequence[str]) -> int:
    """Encode a data set's images by a VAE into a latent cache to train on; under torchrun, by several processes."""
    parser = make_parser("encode", encode.__doc__ or "")
    parser.add_argument("source", type=str, help="a folder of images, or what --kind huggingface takes")
    parser.add_class_arguments(EncodeOptions)
    parser.add_class_arguments(DataConfig, skip=_NOT_OF_IMAGES)
    parser.set_defaults({"kind": "folder", "image_size": 256})
    name, rest = _positional(parser, arguments, "source", "diffusion-moe encode IMAGES --vae VAE --output CACHE")
    parsed = parse(parser, [name, *rest])
    own = {field: parsed[field] for field in _fields(EncodeOptions)}
    images = {field: parsed[field] for field in _fields(DataConfig) & (vars(parsed).keys() - own.keys())}
    from .encoding.encode import encode as run_encoding

    log(run_encoding(DataConfig(path=name, **images), EncodeOptions(**own), log))
    return 0


_NOT_OF_IMAGES = {
    *("path", "channels", "flip", "normalize", "test_fraction", "buckets"),
    *("caption_column", "text_encoder", "text_length", "text_precision"),
}
"""Fields of `DataConfig` that `encode` has no use for, or options of its own."""


def text_encoder(arguments: Sequence[str]) -> int:
    """Make a small text encoder and tokenizer for the coloured shapes, from nothing, in a minute."""
    parser = make_parser("text-encoder", text_encoder.__doc__ or "")
    parser.add_argument("output", type=Path, help="its folder; one that is there already stays")
    parser.add_class_arguments(TextEncoderOptions)
    _, _ = _positional(parser, arguments, "folder", "diffusion-moe text-encoder FOLDER")
    parsed = parse(parser, arguments)
    from .shapes.text_encoder.train import make_text_encoder

    make_text_encoder(parsed.output, _of(TextEncoderOptions, parsed), log)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run, a converted or pipeline folder, a folder of images or an .npz against real images.

    Images of a folder or an .npz take --reference, --extractor, --inception, --output, --num_samples and --batch_size.
    """
    from .sampling.source import is_model

    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    if path is not None and (path.suffix == ".npz" or path.is_dir()) and not is_model(path):
        parser = make_parser("evaluate", evaluate.__doc__ or "")
        parser.add_argument("source", type=str, help="a folder of images or an .npz")
        parser.add_class_arguments(ImagesOptions)
        parsed = parse(parser, arguments)
        from .evaluation.evaluate import evaluate_images

        with _processes() as tell:
            evaluate_images(path, _of(ImagesOptions, parsed), tell)
        return 0
    source, options, settings = _source_options("evaluate", evaluate.__doc__ or "", arguments, options=EvaluateOptions)
    source = dataclasses.replace(source.with_vae(options.vae), weights=options.weights)
    from .evaluation.evaluate import evaluate_model
    from .sampling.generate import with_precision

    with _processes() as tell:
        with_precision(settings, tell)
        evaluate_model(source, settings, options, tell)
    return 0


def stats(arguments: Sequence[str]) -> int:
    """Make statistics of real images for `evaluate`: of a recipe's or run's data, a folder of images or an .npz."""
    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    is_run = path is not None and RunFolder(path).recipe.is_file()
    has_recipe = path is None or is_run or not (path.is_dir() or path.suffix == ".npz")
    parser = make_parser("stats", stats.__doc__ or "", {"data": SECTIONS["data"]} if has_recipe else None)
    parser.add_argument("source", type=str, help="a recipe's name or file, a run, a folder of images, or an .npz")
    parser.add_class_arguments(StatsOptions)
    name, rest = _positional(parser, arguments, "data", "diffusion-moe stats DATA")
    file = RunFolder(Path(name)).recipe if is_run else find_recipe(name) if has_recipe else None
    of_file = [] if file is None else [text for text in recipe_arguments(file) if text.startswith("--data.")]
    parsed = parse(parser, [name, *of_file, *rest])
    from .evaluation.make_statistics import make_statistics

    with _processes() as tell:
        make_statistics(name, parsed.get("data"), _of(StatsOptions, parsed), tell)
    return 0


def sweep(arguments: Sequence[str]) -> int:
    """Score a grid of guidance, weights, steps, solvers and thresholds: a table, a CSV and figures."""
    from .evaluation.grid import AXES, make_points, read_grid
    from .sampling.source import read_source

    parser = make_parser("sweep", sweep.__doc__ or "")
    parser.add_argument("source", type=str, help="folder of a run, or one that `diffusion-moe convert` made")
    parser.add_class_arguments(EvaluationConfig, skip=set(AXES))
    parser.add_class_arguments(SweepOptions)
    name, rest = _positional(parser, arguments, "folder", "diffusion-moe sweep FOLDER")
    source = read_source(Path(name))
    usual = {key: value for key, value in vars(source.settings).items() if key not in AXES}
    parser.set_defaults(usual)
    grid = parse(parser, [name, *rest]).grid
    lists, of_file = ({}, []) if grid is None else read_grid(grid)
    parsed = parse(parser, [name, *of_file, *rest])
    options = _of(SweepOptions, parsed)
    settings = dataclasses.replace(source.settings, **{key: parsed[key] for key in usual})
    if source.config.num_classes == 0 and source.config.text_dim == 0:
        settings = dataclasses.replace(settings, guidance_scale=1.0)
    from .evaluation.sweep import sweep as run_sweep
    from .sampling.generate import with_precision

    with _processes() as tell:
        points = make_points(options, lists, with_precision(settings, tell))
        run_sweep(source.with_vae(options.vae), points, options, tell)
    return 0


def analyze(arguments: Sequence[str]) -> int:
    """Record the routers while sampling, and write report.html with figures and data; settings default to the run's."""
    from .analysis.options import AnalyzeOptions

    source, options, settings = _source_options(
        "analyze",
        analyze.__doc__ or "",
        arguments,
        {"acceleration"},  # it would hide the routers
        options=AnalyzeOptions,
        usual={"num_samples": 100, "steps": 20},
    )
    from .analysis.run import analyze as write_report
    from .sampling.generate import with_precision

    settings = with_precision(settings, log)
    log(f"wrote {write_report(source, settings, options, log)}")
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
        log(json.dumps(record))
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the shipped recipes with their parameters (M of 2^20, as the papers count)."""
    parser = make_parser("recipes", recipes.__doc__ or "")
    parser.add_argument("--flops", action="store_true", help="count compute too")
    with_flops = parse(parser, arguments).flops
    from .counts import PAPER_MILLION, model_flops, model_size

    width = max(len(name) for name in recipe_names()) + 2
    log(
        f"{'recipe':{width}}{'router':10}{'total M':>10}{'activated M':>14}"
        + (f"{'GFLOPs per image and step':>28}" if with_flops else "")
    )
    for name in recipe_names():
        config = read_recipe(name).model
        size = model_size(config)
        total, activated = size.total / PAPER_MILLION, size.activated / PAPER_MILLION
        flops = f"{model_flops(config).total / 1e9:28.3f}" if with_flops else ""
        log(f"{name:{width}}{config.router:10}{total:10.1f}{activated:14.1f}{flops}")
    return 0


def _starting_point(parsed: Namespace, run: RunFolder | None = None) -> tuple[PretrainedModel | None, list[str]]:
    """The model to start from, and its settings as options for what the recipe leaves out."""
    if parsed.init.from_checkpoint is None:
        return None, []
    from .initialization import PretrainedModel, model_options

    init = InitConfig(**parsed.init.as_dict())
    point = PretrainedModel(init)
    return point, model_options(init, point, run)


def _positional(parser: ArgumentParser, arguments: Sequence[str], name: str, usage: str) -> tuple[str, list[str]]:
    """The verb's first argument and the others; --help is answered here."""
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help()
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"the {name} is missing; usage: {usage} [options]")
    return arguments[0], list(arguments[1:])


def _source_options(
    verb: str,
    description: str,
    arguments: Sequence[str],
    unheeded: Set[str] = frozenset(),
    options: type | None = None,
    usual: Mapping[str, Any] | None = None,
) -> tuple[Source, Any, EvaluationConfig]:
    """The folder, the verb's own options, and sampling settings (options but for the unheeded ones).

    Args:
        usual: settings that the verb does not take from the run.
    """
    parser = make_parser(verb, description)
    parser.add_argument("source", type=str, help="folder of a run, or one that `diffusion-moe convert` made")
    parser.add_class_arguments(EvaluationConfig, skip=set(unheeded))
    if options is not None:
        parser.add_class_arguments(options)
    parser.set_defaults(dict(usual or {}))
    name, rest = _positional(parser, arguments, "folder", f"diffusion-moe {verb} FOLDER")
    from .sampling.source import read_source

    source = read_source(Path(name))
    unconditional = source.config.num_classes == 0 and source.config.text_dim == 0
    defaults = vars(source.settings) | ({"guidance_scale": 1.0} if unconditional else {}) | dict(usual or {})
    parser.set_defaults({key: value for key, value in defaults.items() if key in parser.get_defaults()})
    parsed = vars(parse(parser, [name, *rest]))
    settings = EvaluationConfig(**{key: parsed.get(key, value) for key, value in defaults.items()})
    if unconditional and settings.guidance_scale != 1:
        raise ValueError(f"guidance_scale is {settings.guidance_scale}, but the model is unconditional; leave it out")
    return source, options and options(**{name: parsed[name] for name in _fields(options)}), settings


def _of(section: type[Section], parsed: Any) -> Section:
    """A dataclass out of parsed arguments that stand at the top."""
    return section(**{name: parsed[name] for name in _fields(section)})


@contextmanager
def _processes() -> Iterator[Callable[[str], None]]:
    """Join torchrun's processes, if there are any; of several, only the main one says something."""
    from .distributed import is_main, torchrun_processes

    with torchrun_processes():
        yield log if is_main() else lambda text: None


def _fields(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "inspect": inspect,
    "plan": plan,
    "sample": sample,
    "convert": convert,
    "encode": encode,
    "text-encoder": text_encoder,
    "evaluate": evaluate,
    "stats": stats,
    "sweep": sweep,
    "analyze": analyze,
    "bench": bench,
    "recipes": recipes,
}


COMPUTING = {"train", "sample", "encode", "text-encoder", "evaluate", "stats", "sweep", "analyze", "bench"}
"""Verbs that run a model."""


def usage() -> str:
    """What `diffusion-moe --help` prints."""
    lines = [f"  {name:14}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
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
        keep_compiled_products()
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
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        print(f"diffusion-moe: {error.strerror or error}{place}", file=sys.stderr)
        return 1
