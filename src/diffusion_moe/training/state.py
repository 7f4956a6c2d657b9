"""The state of training: model, EMAs and optimizer, from a recipe or from any model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..config import Recipe
from ..data import Segment
from ..models import Backbone, make_model
from ..moe import recompute_experts
from ..text import TextFeatures
from .initialization import freeze_and_add_adapters, share_frozen
from .muon import make_optimizer
from .optimizer import LocalAdamW
from .parallelize import Meshes, parallelize


@dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    model: Backbone
    ema: Backbone
    optimizer: LocalAdamW
    step: int = 0
    """Steps done."""
    meshes: Meshes | None = None
    """None for a single process."""
    extra_emas: dict[float, Backbone] = field(default_factory=dict)
    """Extra EMAs by decay."""
    posthoc_emas: dict[float, Backbone] = field(default_factory=dict)
    """EMAs that are kept in snapshots, by width; see `snapshots`."""
    skipped_steps: set[int] = field(default_factory=set)
    """Steps whose batches are skipped because they were not finite; see `nonfinite`."""
    nonfinite_steps: list[int] = field(default_factory=list)
    """Non-finite steps since the last finite one."""
    rolled_back: bool = False
    """True from a roll-back until a step beyond the skipped ones is finite."""
    segments: tuple[Segment, ...] = ()
    """Batch sizes of the steps so far and of the next ones; see `data.order`."""

    @property
    def emas(self) -> list[Backbone]:
        """The main EMA and all others."""
        return [self.ema, *self.extra_emas.values(), *self.posthoc_emas.values()]

    def replace_with(self, make: Callable[[], TrainState]) -> None:
        """Become another state, which is built after the memory of this one is freed."""
        vars(self).clear()
        gc.collect()  # modules that FSDP2 shards refer to themselves
        vars(self).update(vars(make()))


def make_state(
    recipe: Recipe,
    device: torch.device,
    meshes: Meshes | None = None,
    initialize: Callable[[Backbone], None] | None = None,
    empty_prompt: TextFeatures | None = None,
) -> TrainState:
    """A fresh model, determined by the seed, with its EMAs and optimizer.

    Args:
        meshes: the meshes to shard over; None for a single process.
        initialize: gives the model other weights before adapters are added (see `initialization`).
        empty_prompt: features of the empty prompt, which model.text_null empty takes for no prompt.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        model = make_model(recipe.model)
        if recipe.model.text_dim and recipe.model.text_null == "empty":
            assert model.text_embedder is not None and empty_prompt is not None
            empty = empty_prompt.to(torch.device("cpu"))
            model.text_embedder.set_null(empty.features[0], None if empty.pooled is None else empty.pooled[0])
        if initialize is not None:
            initialize(model)
        freeze_and_add_adapters(model, recipe.init)
    state = state_from_model(model, recipe, device, meshes)
    if meshes is None:
        share_frozen(state.model, state.emas)
    return state


def state_from_model(model: Backbone, recipe: Recipe, device: torch.device, meshes: Meshes | None = None) -> TrainState:
    """The state before the first step, for any model; the model itself is trained."""
    training = recipe.training

    def on_device(model: Backbone) -> Backbone:
        # Sharded block by block before it is moved: no device needs room for the whole model.
        if meshes is not None:
            parallelize(model, recipe, meshes)
        return model.to(device)

    def ema() -> Backbone:
        return on_device(copy.deepcopy(model).eval().requires_grad_(False))

    main_ema = ema()
    extra_emas = {decay: ema() for decay in training.extra_ema_decays}
    posthoc_emas = {std: ema() for std in training.posthoc_ema_stds}
    if training.recompute == "blocks":
        model.enable_gradient_checkpointing()
    recompute_experts(model, training.recompute == "experts")
    if training.compile:
        rule = recipe.model.rule
        model.compile_blocks(fullgraph=meshes is None and (rule is None or rule.has_fixed_rows))
    model = on_device(model.train())
    return TrainState(
        model,
        main_ema,
        make_optimizer(model, recipe, device),
        meshes=meshes,
        extra_emas=extra_emas,
        posthoc_emas=posthoc_emas,
        segments=(Segment(0, training.batch_size),),
    )
