"""What is measured: the layer, a training step, sampling; and what each is held against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import EvaluationConfig, ModelConfig, Recipe, Solver, read_recipe
from ..data import Batch
from ..models import Backbone, make_model
from ..models.block import make_moe
from ..moe import MoEFeedForward, recompute_experts
from ..moe.precision import matmul_dtype
from ..sampling.generate import generate
from ..training.state import state_from_model
from ..training.step import train_step
from .contestants import Contestant, layer_contestants
from .measure import compare, machine
from .options import Against, BenchOptions, What
from .products import products
from .rivals import first_line, make_rival, rival_version
from .scaling import scaling

TOLERANCE = 0.03
"""Largest difference to another library's answer, relative to the answer's norm: bfloat16 rounds to 0.004."""


@dataclass(frozen=True)
class Setting:
    """A recipe and where it runs."""

    recipe: Recipe
    against: Against
    images: int
    tokens_an_image: int
    device: torch.device
    dtype: torch.dtype
    options: BenchOptions

    @property
    def config(self) -> ModelConfig:
        return self.recipe.model


def measure(what: What, options: BenchOptions) -> Iterator[dict[str, Any]]:
    """One record a measurement, ready for JSON.

    Raises:
        ValueError: the recipe has no experts, the tokens do not make whole images, there is no such device, or what
            the recipe is held against is missing or does not suit it.
    """
    _check_speed(what, options)
    setting = _setting(options)
    device, dtype = setting.device, setting.dtype
    about = {"recipe": options.recipe, "tokens": options.tokens, "images": setting.images, "dtype": options.dtype}
    about |= {"recompute": options.recompute, "acceleration": options.acceleration}
    if what in ("products", "scaling"):
        if options.against is not None:
            raise ValueError(f"against is {options.against}, but {what} has no rivals; leave it out")
        run = products if what == "products" else scaling
        taken = matmul_dtype(torch.empty(0, device=device), dtype) if what == "products" else dtype
        for record in run(setting.config, setting.images, setting.tokens_an_image, options.seconds, device, taken):
            yield {"benchmark": what, **about, **record} | machine(device)
        return
    version = {"against_version": rival_version(setting.against)}
    for mode, extra, ours, theirs in CASES[what](setting):
        record = {"benchmark": what, "mode": mode, **about, "against": setting.against, **version, **extra}
        record |= compare(ours, theirs, options.seconds, device, dtype)
        if what != "layer":
            for prefix in ("", "against_"):
                record[f"{prefix}images_per_second"] = setting.images / (record[f"{prefix}ms"] / 1e3)
        yield record | machine(device)


def _setting(options: BenchOptions) -> Setting:
    recipe = read_recipe(options.recipe)
    config = recipe.model
    if config.router == "dense":
        raise ValueError(f"recipe {options.recipe} has no experts; choose one with a router")
    tokens_an_image = (config.sample_size // config.patch_size) ** 2
    if options.tokens % tokens_an_image:
        raise ValueError(f"tokens is {options.tokens}; give a multiple of an image's {tokens_an_image}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no CUDA device is available; set it to auto or cpu")
    return Setting(
        replace(recipe, model=replace(config, expert_dropout=0.0)),
        options.against or "loop",
        options.tokens // tokens_an_image,
        tokens_an_image,
        torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"),
        getattr(torch, options.dtype),
        options,
    )


def _check_speed(what: What, options: BenchOptions) -> None:
    """Options that mean nothing for a benchmark, or cannot be had, are refused."""
    against = options.against or "loop"
    if options.recompute and what not in ("layer", "step"):
        raise ValueError(f"recompute is true, but {what} has no backward pass to make it in; leave it out")
    if options.acceleration not in {"step": ("none", "compile"), "sample": ("none", "compile", "graph")}.get(
        what, ("none",)
    ):
        raise ValueError(f"acceleration is {options.acceleration}, which {what} does not have; leave it out")
    if options.acceleration != "none" and against != "dense":
        raise ValueError(
            f"acceleration is {options.acceleration}, but {against} cannot be compiled or captured; choose dense"
        )
    if options.solver_steps != BenchOptions.solver_steps and what != "sample":
        raise ValueError(f"solver_steps is {options.solver_steps}, but only sample has a solver; leave it out")


Pairs = Iterator[tuple[str, dict[str, Any], Contestant, Contestant]]
"""The mode, what else there is to say of it, ours and theirs."""


def _rival(layer: MoEFeedForward, setting: Setting) -> nn.Module:
    config = setting.config
    return make_rival(setting.against, layer, config.experts_per_token, setting.device, setting.dtype)


def _layer(setting: Setting) -> Pairs:
    device, dtype = setting.device, setting.dtype
    torch.manual_seed(0)
    layer = make_moe(setting.config).train()
    rival = _rival(layer, setting).train()
    recompute_experts(layer, setting.options.recompute)
    shape = (setting.images, setting.tokens_an_image, setting.config.hidden_size)
    x = torch.randn(shape, device=device, requires_grad=True)
    direction = torch.randn(shape, device=device)
    ours, theirs = (layer_contestants(module.to(device), x, direction, dtype) for module in (layer, rival))
    differs = {} if setting.against == "dense" else {"difference": _difference(ours, theirs, setting.against)}
    for mode in ("forward", "forward+backward"):
        yield mode, differs, ours[mode], theirs[mode]


@torch.no_grad()
def _difference(ours: dict[str, Contestant], theirs: dict[str, Contestant], against: Against) -> float:
    """How far their answer is from ours, relative to its norm.

    Raises:
        ValueError: too far to be rounding, or they cannot answer at all.
    """
    expected = ours["forward"].run()[0].float()
    name = f"{against} {rival_version(against) or ''}".strip()
    try:
        answer = theirs["forward"].run()[0].float()
    except Exception as error:  # another library's code: whatever goes wrong in it
        raise ValueError(f"{name} fails on this layer: {first_line(error)}") from error
    difference = float((answer - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        raise ValueError(f"the answer of {name} differs from ours by {difference:.3g} of its norm; it cannot be held")
    return difference


def replace_mixtures(model: Backbone, setting: Setting) -> Backbone:
    """The model with every MoE layer in its rival's form, in place."""
    for block in model.blocks:
        if isinstance(block.mlp, MoEFeedForward):
            block.mlp = _rival(block.mlp, setting).to(model.device)
    return model


def _models(setting: Setting) -> tuple[Backbone, Backbone]:
    torch.manual_seed(0)
    model = make_model(setting.config).to(setting.device)
    return model, replace_mixtures(copy.deepcopy(model), setting)


def _step(setting: Setting) -> Pairs:
    training = replace(
        setting.recipe.training,
        batch_size=setting.images,
        accumulation=1,
        extra_ema_decays=(),
        precision="fp32" if setting.dtype == torch.float32 else "bf16",
        recompute="none",
        compile=setting.options.acceleration == "compile",
    )
    recipe, config = replace(setting.recipe, training=training), setting.config
    generator = torch.Generator().manual_seed(0)
    shape = (setting.images, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.randint(max(1, config.num_classes), (setting.images,), generator=generator)
    batch = Batch(torch.randn(shape, generator=generator), labels)
    if setting.device.type == "cuda":  # as the training loop's loader gives it
        batch = Batch(batch.images.pin_memory(), batch.labels.pin_memory())
    model, rival = _models(setting)
    again = replace(training, recompute="experts" if setting.options.recompute else "none")
    ours, theirs = (
        state_from_model(model, replace(recipe, training=again), setting.device),
        state_from_model(rival, recipe, setting.device),
    )
    contestants = [
        Contestant(lambda: train_step(ours, recipe, batch)),
        Contestant(lambda: train_step(theirs, recipe, batch)),
    ]
    yield "step", {}, contestants[0], contestants[1]


def _sample(setting: Setting) -> Pairs:
    config, images = setting.config, setting.images
    solver: Solver = "euler" if config.process == "flow" else "ddim"
    settings = EvaluationConfig(
        num_samples=images,
        batch_size=images,
        steps=setting.options.solver_steps,
        solver=solver,
        precision="fp32" if setting.dtype == torch.float32 else "bf16",
        acceleration=setting.options.acceleration,
    )
    labels = torch.arange(images) % config.num_classes if config.num_classes else None
    if labels is None or not config.null_class:
        settings = replace(settings, guidance_scale=1.0)

    def contestant(model: Backbone) -> Contestant:
        plain = replace(settings, acceleration="none")
        return Contestant(
            lambda: generate(model, labels, images, settings),
            counted=lambda: generate(model, labels, images, plain),
        )

    model, rival = _models(setting)
    about = {"solver": solver, "solver_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    yield "sample", about, contestant(model.eval()), contestant(rival.eval())


CASES = {"layer": _layer, "step": _step, "sample": _sample}
