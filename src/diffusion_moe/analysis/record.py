"""Everything that the figures of a report show, gathered from a run or a model folder.

Shape suffixes: L MoE layers, S bins of time, K classes, E experts, R groups of images, P places of an image,
I example images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import EvaluationConfig, ModelConfig, Recipe
from ..data import ImageDataset, load_dataset
from ..evaluation.options import TextOptions
from ..log import Log
from ..models import Backbone
from ..moe import MoEFeedForward, routers_of
from ..pixels import to_uint8
from ..run_folder import RunFolder
from ..sampling.generate import SamplingStats, check_solver, generate_batches, sampling_metadata
from ..sampling.loading import best_device, load_decoder, load_weights
from ..sampling.source import Source, read_source
from .losses import Curves, HeldOut, held_out_loss, held_out_rows, read_curves
from .measures import cosines, expert_maps, spread_out
from .records import RoutingCounts, record_routing
from .subjects import Noted, Subjects, captions_of, subjects_of

GROUPS, EXAMPLES, TIME_BINS = 5, 6, 20
"""Images are drawn in at least so many groups, whose spread gives standard errors; so many are shown one by one; and
times are told apart in so many bins, or as many as there are solver steps."""
PLURALS = {"class": "classes", "category": "categories", "prompt": "prompts"}


class Examples(NamedTuple):
    """Some images one by one."""

    classes_I: list[int]
    """Class of each, or kind of its prompt; where there is but one, their numbers."""
    pictures: np.ndarray | None
    """uint8, (I, H, W, C); None for latents that nothing decodes."""
    compute_ISP: np.ndarray
    """Experts a token of each image, time and place, averaged over layers, with its class or prompt (not without)."""
    texts: list[str]
    """Their prompts, of a model with text."""


class Groups(NamedTuple):
    """Counts of each group of images alone, summed over layers, without those for "no class"."""

    served_RS: np.ndarray
    tokens_RS: np.ndarray
    served_RK: np.ndarray
    tokens_RK: np.ndarray


class TextTokens(NamedTuple):
    """Of text tokens that are routed too, summed over layers, evaluations with a prompt alone."""

    served_S: np.ndarray
    tokens_S: np.ndarray


class Sampling(NamedTuple):
    """What routers did while images were drawn. Of a model with text, kinds of prompts stand for classes throughout."""

    counts: RoutingCounts
    """Over all images, with their classes; "no class" is apart."""
    null_served_LSE: np.ndarray | None
    null_tokens_LS: np.ndarray | None
    """The same for "no class"; None unless guidance evaluated it."""
    evaluations: int
    """Of the network, one an image, with and without class."""
    groups: Groups
    examples: Examples
    about: dict[str, Any]
    """How the images were sampled: `sampling_metadata`, num_samples, batch_size, the number of classes, and where
    prompts are from."""
    text: TextTokens | None = None
    """Of a model whose text and image are one sequence."""


class Weights(NamedTuple):
    """How alike the experts of a layer are."""

    experts_LEE: np.ndarray
    """Cosine of `measures.expert_maps`."""
    routers_LEE: np.ndarray
    """Cosine of the routers' vectors."""


@dataclass(frozen=True)
class Findings:
    """All that a report is made of."""

    name: str
    model: ModelConfig
    origin: dict[str, Any]
    """How the weights came to be; see `Source.weights_metadata`."""
    class_names: list[str]
    sampling: Sampling | None
    """None for a model without routers."""
    weights: Weights | None
    curves: list[Curves]
    held_out: list[HeldOut]
    """The model's own first, then of the runs it is compared with."""
    data: str = ""
    """What the held-out images are."""
    loss: str = ""
    """What the training loss compares: velocity, x or epsilon; empty for a folder that is no run."""
    missing: tuple[str, ...] = ()
    """Why something is not there, a sentence each."""
    kind: str = "class"
    """What `class_names` name: class; or of a model with text category or prompt."""

    @property
    def kinds(self) -> str:
        """Several of them."""
        return PLURALS[self.kind]

    @property
    def condition(self) -> str:
        """What guidance leaves out."""
        return "prompt" if self.model.text_dim else "class"


def collect(
    source: Source,
    settings: EvaluationConfig,
    compare: Sequence[Path] = (),
    log: Log = print,
    asked: TextOptions | None = None,
) -> Findings:
    """Sample with the routers recorded, and read what training left.

    Args:
        compare: runs whose loss is set beside. log: receives a line of progress now and then. asked: what images show,
            of a model with text.

    Raises:
        ValueError: the settings do not fit the model, weights are damaged, or a run cannot be compared.
    """
    check_solver(source.config, settings)
    settings, asked = _as_recorded(settings), asked or TextOptions()
    subjects = subjects_of(source, settings, asked, log)
    others = [_comparable(source, path) for path in compare]
    model, vae, no_vae = _load(source)
    recipe = RunFolder(source.path).read_recipe() if RunFolder(source.path).recipe.is_file() else None
    dataset, problem = _held_out_data(recipe)
    curves, held_out = _losses_of_runs([source, *others], model, recipe, dataset, settings.seed, asked.text_encoder)
    names = list(source.class_names) or (dataset.class_names if dataset is not None else [])
    if len(names) != source.config.num_classes:
        names = [str(k) for k in range(source.config.num_classes)]
    names = names if subjects is None else subjects.names
    has_routers = bool(routers_of(model))
    return Findings(
        name=source.path.resolve().name,
        model=source.config,
        origin=source.weights_metadata(),
        class_names=names or ["all"],
        sampling=_sample(model, vae, settings, log, subjects) if has_routers else None,
        weights=_weights(model) if has_routers else None,
        curves=curves,
        held_out=held_out,
        data="" if recipe is None else " ".join(filter(None, (recipe.data.kind, recipe.data.path))),
        loss="" if recipe is None else recipe.diffusion.loss or recipe.model.prediction,
        missing=tuple(filter(None, (problem, no_vae))),
        kind="class" if subjects is None else subjects.kind,
    )


def _as_recorded(settings: EvaluationConfig) -> EvaluationConfig:
    """Sampling that hooks can see: compiled models and captured graphs leave them out."""
    fast = [field.name for field in fields(settings) if field.name == "acceleration"]
    return replace(settings, **dict.fromkeys(fast, "none"))  # type: ignore[arg-type]


def _load(source: Source) -> tuple[Backbone, Any, str]:
    """The model; the VAE, if there is one and it can be loaded; and else why not."""
    model = load_weights(source).to(best_device())
    try:
        vae = load_decoder(source)
    except ValueError as error:
        return model, None, f"Images are not shown, as the VAE cannot be loaded: {error}."
    return model, None if vae is None else vae.to(best_device()), ""


def _comparable(source: Source, path: Path) -> Source:
    """A run whose losses mean the same as those of `source`."""
    own, other = RunFolder(source.path), RunFolder(path)
    if not own.recipe.is_file():
        raise ValueError(f"compare is given, but {source.path} is no run, so it has no loss to compare; leave it out")
    mine, theirs = own.read_recipe(), other.read_recipe()

    def meaning(recipe: Recipe) -> dict[str, Any]:
        data = {f"data.{name}": getattr(recipe.data, name) for name in ("kind", "path", "image_size", "channels")}
        loss = recipe.diffusion.loss or recipe.model.prediction
        model = {f"model.{name}": getattr(recipe.model, name) for name in ("process", "noise_scale", "num_classes")}
        how = {"diffusion.loss": loss, "diffusion.loss_min_gap": recipe.diffusion.loss_min_gap}
        return data | model | how | {"data.test_fraction": recipe.data.test_fraction}

    for name, value in meaning(mine).items():
        if meaning(theirs)[name] != value:
            raise ValueError(
                f"{path} has {name} {meaning(theirs)[name]} and {source.path} {value}, so their losses do not compare; "
                "leave it out of --compare"
            )
    return read_source(path)


def _held_out_data(recipe: Recipe | None) -> tuple[ImageDataset | None, str]:
    """The images that training left out; or none, and why."""
    if recipe is None:
        return None, "This folder is no run: it has no training curves and no data of its own."
    if recipe.data.test_fraction == 0:
        return None, "The run held no images out of training (data.test_fraction is 0)."
    if recipe.data.buckets:
        return None, "The run's images are of several sizes, so that there is no held-out loss."
    try:
        # Captions are encoded by whoever needs some of them.
        return load_dataset(replace(recipe.data, text_encoder=None), "test"), ""
    except ValueError as error:
        return None, f"The data cannot be read, so that there is no held-out loss: {error}."


def _losses_of_runs(
    sources: Sequence[Source],
    model: Backbone,
    recipe: Recipe | None,
    dataset: ImageDataset | None,
    seed: int,
    text_encoder: str | None,
) -> tuple[list[Curves], list[HeldOut]]:
    """Curves and held-out losses of the run itself, whose model is loaded, and of the others."""
    if recipe is None:
        return [], []
    curves, held_out = [], []
    for i, (source, name) in enumerate(zip(sources, distinct_names([source.path for source in sources]))):
        run = RunFolder(source.path)
        training = run.read_recipe().training
        about = f"{name}: {training.batch_size} images a step, seed {training.seed}"
        found = read_curves(run.metrics, name, about, recipe.model.process == "ddpm")
        curves += [found] if found is not None else []
        if dataset is not None:
            own = model if i == 0 else load_weights(source).to(best_device())
            steps = source.weights_metadata().get("training_steps")
            text = captions_of(source, dataset, held_out_rows(dataset), text_encoder if i == 0 else None)
            held_out.append(held_out_loss(own, run.read_recipe(), dataset, name, steps, seed, text))
    return curves, held_out


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of folders, with as many of the folders above as tell them apart; of the same folder again, numbered."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    again = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, again)]


def class_choice(count: int, num_classes: int) -> Tensor | None:
    """Class of each image, in turn; with fewer images than classes, classes that are evenly spaced; None without."""
    if num_classes == 0:
        return None
    return torch.arange(count) % num_classes if count >= num_classes else torch.tensor(spread_out(num_classes, count))


def _sample(model: Backbone, vae: Any, settings: EvaluationConfig, log: Log, subjects: Subjects | None) -> Sampling:
    count, kinds = settings.num_samples, 1 if subjects is None else len(subjects.names)
    K = max(kinds, model.settings.num_classes)
    # Groups of whole rounds of classes where there are enough images for that.
    size = K * (count // (GROUPS * K)) or -(-count // GROUPS)
    settings = replace(settings, batch_size=min(size, settings.batch_size))
    labels, usage = class_choice(count, model.settings.num_classes), SamplingStats()
    total: RoutingCounts | None = None
    groups: list[list[np.ndarray]] = []
    done, spoke = 0, time.monotonic()
    with record_routing(model, min(TIME_BINS, settings.steps), pairs=True, places=True, kinds=kinds) as record:
        prompts = None if subjects is None else Noted(subjects, record)
        for batch in generate_batches(model, labels, count, settings, stats=usage, prompts=prompts):
            counts = record.counts()
            record.clear()
            total = counts if total is None else total.plus(counts)
            served_SK, tokens_SK = counts.served_LSK.sum(0)[:, :K], counts.tokens_LSK.sum(0)[:, :K]
            groups.append([served_SK.sum(1), tokens_SK.sum(1), served_SK.sum(0), tokens_SK.sum(0)])
            done += len(batch)
            if time.monotonic() - spoke > 10 and done < count:
                log(f"recorded {done} of {count} images")
                spoke = time.monotonic()
    assert total is not None
    guided = bool(total.tokens_LSK[:, :, K:].any())
    return Sampling(
        total._replace(
            served_LSKE=total.served_LSKE[:, :, :K],
            tokens_LSK=total.tokens_LSK[:, :, :K],
            images_SK=total.images_SK[:, :K],
        ),
        total.served_LSKE[:, :, K] if guided else None,
        total.tokens_LSK[:, :, K] if guided else None,
        int(total.images_SK.sum()),
        Groups(*map(np.stack, zip(*groups))),
        _examples(model, vae, settings, subjects),
        {
            "num_samples": count,
            "num_classes": _classes_drawn(labels, subjects),
            "batch_size": settings.batch_size,
            **({} if subjects is None else subjects.shown.metadata()),
            **sampling_metadata(settings, usage),
        },
        _text_tokens(model.settings, total, K),
    )


def _classes_drawn(labels: Tensor | None, subjects: Subjects | None) -> int:
    """How many classes or kinds of prompts there are images of; 0 where they are not told apart."""
    if subjects is not None:
        return len(subjects.kinds_I.unique()) if len(subjects.names) > 1 else 0
    return 0 if labels is None else len(labels.unique())


def _text_tokens(config: ModelConfig, total: RoutingCounts, kinds: int) -> TextTokens | None:
    """What text tokens got, if they are routed."""
    if not config.text_dim or config.text_conditioning != "joint":
        return None
    assert total.others_SK is not None
    tokens_S = total.images_SK[:, :kinds].sum(1) * config.text_length * len(total.tokens_LSK)
    return TextTokens(total.others_SK[:, :kinds].sum(1), tokens_S)


def _examples(model: Backbone, vae: Any, settings: EvaluationConfig, subjects: Subjects | None) -> Examples:
    """A few images one by one, so that each has a map of its own."""
    config, count = model.settings, min(EXAMPLES, settings.num_samples)
    classes = class_choice(EXAMPLES, config.num_classes)
    if config.num_classes and config.num_classes < EXAMPLES:
        classes = torch.arange(config.num_classes)
    labels = list(range(EXAMPLES)) if classes is None else classes.tolist()
    kinds, texts = 1, list[str]()
    if subjects is not None:
        kinds, texts = len(subjects.names), subjects.texts(count)
        labels = subjects.kinds_I[:count].tolist() if kinds > 1 else list(range(count))
    shows = config.in_channels in (1, 3) or vae is not None
    pictures, maps = [], []
    settings = replace(settings, batch_size=1)
    with record_routing(model, min(TIME_BINS, settings.steps), places=True, kinds=kinds) as record:
        prompts = None if subjects is None else Noted(subjects, record)
        decoder = vae if shows else None
        for i, image in enumerate(generate_batches(model, classes, len(labels), settings, decoder, prompts=prompts)):
            counts, row = record.counts(), labels[i] if classes is not None or kinds > 1 else 0
            record.clear()
            assert counts.compute_SKP is not None
            layers = len(counts.tokens_LSK)
            with np.errstate(invalid="ignore"):
                maps.append(counts.compute_SKP[:, row] / (layers * counts.images_SK[:, row, None]))
            pictures.append(to_uint8(image)[0].permute(1, 2, 0).numpy())
    return Examples(labels, np.stack(pictures) if shows else None, np.stack(maps), texts)


@torch.no_grad()
def _weights(model: Backbone) -> Weights:
    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    experts, routers = [], []
    for layer in layers:  # one at a time: the maps of large experts are large
        w_in, w_out = (w.float().cpu().numpy() for w in (layer.experts.w_in, layer.experts.w_out))
        experts.append(cosines(expert_maps(w_in, w_out)))
        routers.append(cosines(layer.router.weight.float().cpu().numpy()))
    return Weights(np.stack(experts), np.stack(routers))
