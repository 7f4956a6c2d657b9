"""Findings: everything that the figures of a report show, gathered from a run or a model folder.

Shape suffixes: L MoE layers, S bins of time, K classes, E experts, R groups of images, P positions in an
image, I example images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ..sampling.generate import SamplingStats
from ..sampling.loading import best_device, load_weights, weights_metadata
from ..sampling.sampler import Sampler, load_sampler, with_progress
from ..sampling.source import Source, read_source
from .losses import Curves, HeldOut, held_out_loss, held_out_rows, read_curves
from .prompt_kinds import PromptKinds, captions_of, prompt_kinds_of
from .recorder import RoutingCounts, record_routing
from .routing_metrics import cosines, evenly_spaced, expert_maps

GROUPS = 5
"""Least number of groups of images, whose spread gives standard errors."""
EXAMPLES = 6
"""Images shown one by one."""
TIME_BINS = 20
"""Bins of time; fewer where the solver takes fewer steps."""
NO_IMAGES = "Images are not shown, as the VAE cannot be loaded: {}."
PLURALS = {"class": "classes", "category": "categories", "prompt": "prompts"}


class Examples(NamedTuple):
    """Some images, one by one."""

    classes_I: list[int]
    """Class of each image, or kind of its prompt; where there is only one, the number of the image."""
    pictures: np.ndarray | None
    """uint8, (I, H, W, C); None for latents without a decoder."""
    compute_ISP: np.ndarray
    """Experts a token at each image, time and position, mean over layers, in evaluations with its class or prompt."""
    texts: list[str]
    """Prompts of a model with text."""


class Groups(NamedTuple):
    """Counts of each group of images, summed over layers, without those for "no class"."""

    served_RS: np.ndarray
    tokens_RS: np.ndarray
    served_RK: np.ndarray
    tokens_RK: np.ndarray


class TokenCounts(NamedTuple):
    """Counts of some of the tokens at each time, summed over layers, in evaluations with a prompt."""

    served_S: np.ndarray
    tokens_S: np.ndarray


class Sampling(NamedTuple):
    """Routing during sampling. For a model with text, kinds of prompts replace classes throughout."""

    counts: RoutingCounts
    """Counts of all images with their classes, without "no class"."""
    null_served_LSE: np.ndarray | None
    null_tokens_LS: np.ndarray | None
    """Counts for "no class"; None unless guidance evaluated it."""
    evaluations: int
    """Evaluations of the network, one per image, with and without class."""
    groups: Groups
    examples: Examples
    about: dict[str, Any]
    """Settings and cost of sampling: `sampling_metadata`, num_samples, batch_size, num_classes, and the origin of
    prompts."""
    tokens: dict[str, TokenCounts]
    """Counts of "image" and of "text" tokens, for a model whose text and image are one sequence; else empty."""


class Weights(NamedTuple):
    """Similarity of the experts of a layer."""

    experts_LEE: np.ndarray
    """Cosine of `routing_metrics.expert_maps`."""
    routers_LEE: np.ndarray
    """Cosine of the routers' vectors; NaN for experts without."""


@dataclass(frozen=True)
class Findings:
    """Contents of a report."""

    name: str
    model: ModelConfig
    origin: dict[str, Any]
    """Metadata of the weights; see `loading.weights_metadata`."""
    class_names: list[str]
    sampling: Sampling | None
    """None for a model without routers."""
    weights: Weights | None
    curves: list[Curves]
    held_out: list[HeldOut]
    """Loss of the model itself, then of the runs it is compared with."""
    data: str = ""
    """Data set of the held-out images."""
    loss: str = ""
    """Target of the training loss (velocity, x or epsilon); empty for a folder that is not a run."""
    missing: tuple[str, ...] = ()
    """Reasons why something is missing, one sentence each."""
    kind: str = "class"
    """Meaning of `class_names`: class; for a model with text category or prompt."""

    @property
    def kinds(self) -> str:
        """Plural of the kind."""
        return PLURALS[self.kind]

    @property
    def condition(self) -> str:
        """Condition that guidance leaves out."""
        return "prompt" if self.model.text_dim else "class"


def gather_findings(
    source: Source,
    settings: EvaluationConfig,
    compare: Sequence[Path] = (),
    log: Log = print,
    asked: TextOptions | None = None,
) -> Findings:
    """Sample with the routers recorded, and read the logs and checkpoints of training.

    Args:
        compare: runs whose losses are compared.
        log: receives lines of progress.
        asked: prompts of a model with text.

    Raises:
        ValueError: the settings do not fit the model, weights are damaged, or a run cannot be compared.
    """
    asked, missing = asked or TextOptions(), list[str]()
    others = [_comparable(source, path) for path in compare]
    settings = replace(settings, acceleration="none")  # hooks do not run in compiled models and captured graphs
    sampler = load_sampler(source, settings, lambda reason: missing.append(NO_IMAGES.format(reason)))
    prompt_kinds = prompt_kinds_of(sampler, asked, log)
    recipe = source.recipe
    dataset, problem = _held_out_data(recipe)
    curves, held_out = _losses_of_runs(sampler, others, dataset, asked.text_encoder)
    names = list(source.class_names) or (dataset.class_names if dataset is not None else [])
    if len(names) != source.config.num_classes:
        names = [str(k) for k in range(source.config.num_classes)]
    names = names if prompt_kinds is None else prompt_kinds.names
    has_routers = bool(routers_of(sampler.model))
    return Findings(
        name=source.path.resolve().name,
        model=source.config,
        origin=sampler.weights_metadata,
        class_names=names or ["all"],
        sampling=_sample(sampler, log, prompt_kinds) if has_routers else None,
        weights=_weights(sampler.model) if has_routers else None,
        curves=curves,
        held_out=held_out,
        data="" if recipe is None else " ".join(filter(None, (recipe.data.kind, recipe.data.path))),
        loss="" if recipe is None else recipe.diffusion.loss or recipe.model.prediction,
        missing=tuple(filter(None, (problem, *missing))),
        kind="class" if prompt_kinds is None else prompt_kinds.kind,
    )


def _comparable(source: Source, path: Path) -> Source:
    """A run, whose losses must be comparable with those of `source`."""
    if source.recipe is None:
        raise ValueError(f"compare is given, but {source.path} is not a run and has no loss; remove compare")
    theirs = _loss_settings(RunFolder(path).read_recipe())
    for name, value in _loss_settings(source.recipe).items():
        if theirs[name] != value:
            raise ValueError(
                f"{path} has {name} {theirs[name]} and {source.path} {value}, so their losses do not compare; remove "
                "it from --compare"
            )
    return read_source(path)


def _loss_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings on which the value of the loss depends."""
    data, model = recipe.data, recipe.model
    return {
        **{f"data.{name}": getattr(data, name) for name in ("kind", "path", "image_size", "channels", "test_fraction")},
        **{f"model.{name}": getattr(model, name) for name in ("process", "noise_scale", "num_classes")},
        "diffusion.loss": recipe.diffusion.loss or model.prediction,
        "diffusion.loss_min_gap": recipe.diffusion.loss_min_gap,
    }


def _held_out_data(recipe: Recipe | None) -> tuple[ImageDataset | None, str]:
    """The held-out images; or None and the reason."""
    if recipe is None:
        return None, "This folder is not a run: it has no training curves and no data."
    if recipe.data.test_fraction == 0:
        return None, "The run held no images out of training (data.test_fraction is 0)."
    if recipe.data.buckets:
        return None, "The run's images are of several sizes; a held-out loss needs one size."
    try:
        # Only the captions that are needed are encoded, later.
        return load_dataset(replace(recipe.data, text_encoder=None), "test"), ""
    except ValueError as error:
        return None, f"The held-out loss is missing because the data cannot be read: {error}."


def _losses_of_runs(
    sampler: Sampler, others: Sequence[Source], dataset: ImageDataset | None, text_encoder: str | None
) -> tuple[list[Curves], list[HeldOut]]:
    """Curves and held-out losses of the run of the sampler, and of the others; empty if it is not of a run."""
    curves, held_out, seed = [], [], sampler.settings.seed
    sources = [sampler.source, *others]
    for source, name in zip(sources, distinct_names([source.path for source in sources])):
        recipe, is_own = source.recipe, source is sampler.source
        if recipe is None:
            continue
        about = f"{name}: {recipe.training.batch_size} images a step, seed {recipe.training.seed}"
        found = read_curves(RunFolder(source.path).metrics, name, about, recipe.model.process == "ddpm")
        if found is not None:
            curves.append(found)
        if dataset is not None:
            model = sampler.model if is_own else load_weights(source).to(best_device())
            steps = weights_metadata(source).get("training_steps")
            text = captions_of(source, dataset, held_out_rows(dataset), text_encoder if is_own else None)
            held_out.append(held_out_loss(model, recipe, dataset, name, steps, seed, text))
    return curves, held_out


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Distinct names of folders, with parents where needed; the same folder again is numbered."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    again = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, again)]


def class_choice(count: int, num_classes: int) -> Tensor | None:
    """Class of each image, in turn; evenly spaced classes if there are fewer images; None without classes."""
    if num_classes == 0:
        return None
    classes = torch.tensor(evenly_spaced(num_classes, count))
    return classes[torch.arange(count) % len(classes)]


def _sample(sampler: Sampler, log: Log, prompt_kinds: PromptKinds | None) -> Sampling:
    config, settings = sampler.source.config, sampler.settings
    count, kinds = settings.num_samples, 1 if prompt_kinds is None else len(prompt_kinds.names)
    K = max(kinds, config.num_classes)
    # Groups of whole rounds of classes where there are enough images for that.
    size = K * (count // (GROUPS * K)) or -(-count // GROUPS)
    settings = replace(settings, batch_size=min(size, settings.batch_size))
    undecoded = replace(sampler, settings=settings, vae=None)
    labels, stats = class_choice(count, config.num_classes), SamplingStats()
    total: RoutingCounts | None = None
    groups: list[list[np.ndarray]] = []
    with record_routing(
        sampler.model, min(TIME_BINS, settings.steps), pairs=True, positions=True, kinds=kinds
    ) as record:
        prompts = None if prompt_kinds is None else replace(prompt_kinds, record=record)
        for _ in with_progress(undecoded.batches(count, labels, prompts, stats=stats), count, log, "recorded"):
            counts = record.counts()
            record.clear()
            total = counts if total is None else total.plus(counts)
            served_SK, tokens_SK = counts.served_LSK.sum(0)[:, :K], counts.tokens_LSK.sum(0)[:, :K]
            groups.append([served_SK.sum(1), tokens_SK.sum(1), served_SK.sum(0), tokens_SK.sum(0)])
    assert total is not None
    guided = bool(total.tokens_LSK[:, :, K:].any())
    kinds_I = labels if prompt_kinds is None else prompt_kinds.kinds_I
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
        _examples(sampler, prompt_kinds),
        {
            "num_samples": count,
            "num_classes": len(kinds_I.unique()) if kinds_I is not None and K > 1 else 0,
            "batch_size": settings.batch_size,
            **({} if prompt_kinds is None else prompt_kinds.prompts.metadata()),
            **undecoded.metadata(stats),
        },
        {} if config.text_conditioning != "joint" or not config.text_dim else _tokens(config, total, K),
    )


def _tokens(config: ModelConfig, total: RoutingCounts, kinds: int) -> dict[str, TokenCounts]:
    """Counts of image and of text tokens, both of which are routed."""
    assert total.others_SK is not None
    served_S, tokens_S = total.served_LSK[:, :, :kinds].sum((0, 2)), total.tokens_LSK[:, :, :kinds].sum((0, 2))
    of_text_S = total.images_SK[:, :kinds].sum(1) * config.text_length * len(total.tokens_LSK)
    text = TokenCounts(total.others_SK[:, :kinds].sum(1), of_text_S)
    return {"image": TokenCounts(served_S - text.served_S, tokens_S - text.tokens_S), "text": text}


def _examples(sampler: Sampler, prompt_kinds: PromptKinds | None) -> Examples:
    """A few images, sampled one by one, so that each has its own map."""
    config, settings = sampler.source.config, replace(sampler.settings, batch_size=1)
    sampler, count = replace(sampler, settings=settings), min(EXAMPLES, settings.num_samples)
    classes = class_choice(min(EXAMPLES, config.num_classes or EXAMPLES), config.num_classes)
    labels = list(range(EXAMPLES)) if classes is None else classes.tolist()
    kinds, texts = 1, list[str]()
    if prompt_kinds is not None:
        kinds, texts = len(prompt_kinds.names), prompt_kinds.texts(count)
        labels = prompt_kinds.kinds_I[:count].tolist() if kinds > 1 else list(range(count))
    shows = config.in_channels in (1, 3) or sampler.vae is not None
    pictures, maps = [], []
    with record_routing(sampler.model, min(TIME_BINS, settings.steps), positions=True, kinds=kinds) as record:
        prompts = None if prompt_kinds is None else replace(prompt_kinds, record=record)
        for i, image in enumerate(sampler.batches(len(labels), classes, prompts)):
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
        has_vectors = "weight" in dict(layer.router.named_parameters())
        vectors = layer.router.weight.float().cpu().numpy() if has_vectors else np.zeros((0, 1))
        routers.append(cosines(np.pad(vectors, ((0, len(w_in) - len(vectors)), (0, 0)))))
    return Weights(np.stack(experts), np.stack(routers))
