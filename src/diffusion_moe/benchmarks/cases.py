"""Cases of the benchmark: the layer, a training step and sampling of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import EvaluationConfig, ModelConfig, Recipe, read_recipe
from ..data import Batch
from ..distributed import choose_device
from ..models import make_model
from ..models.block import make_moe
from ..moe import recompute_experts
from ..moe.precision import matmul_dtype
from ..sampling.generate import generate
from ..training.state import state_from_model
from ..training.step import train_step
from .candidates import Candidate, layer_candidates
from .matmuls import matmuls
from .measure import interleaved, machine, measurements
from .options import BenchOptions, What
from .scaling import scaling
from .waits import waits

ACCELERATIONS = {"step": ("none", "compile"), "sample": ("none", "compile", "graph")}
"""Accelerations of each case; the others have none."""


@dataclass(frozen=True)
class Setting:
    """A recipe and where it runs."""

    recipe: Recipe
    images: int
    tokens_an_image: int
    device: torch.device
    dtype: torch.dtype
    options: BenchOptions

    @property
    def config(self) -> ModelConfig:
        return self.recipe.model

    def metadata(self, what: What) -> dict[str, Any]:
        """Keys of the record that identify the measurement."""
        options = self.options
        found = {"benchmark": what, "recipe": options.recipe, "tokens": options.tokens, "images": self.images}
        found |= {"dtype": options.dtype, "recompute": options.recompute, "acceleration": options.acceleration}
        if what == "sample":
            settings = sampling_settings(self)
            found |= {"solver": settings.solver, "solver_steps": settings.steps}
            found["guidance_scale"] = settings.guidance_scale
        return found


def measure(what: What, options: BenchOptions) -> Iterator[dict[str, Any]]:
    """One record a measurement, ready for JSON.

    Raises:
        ValueError: the recipe has no experts, the tokens do not make whole images, there is no such device, or an
            option does not fit.
    """
    if what == "waits":
        _check_options(what, options)
        yield waits(options)
        return
    setting = read_setting(what, options)
    device, dtype = setting.device, setting.dtype
    metadata = setting.metadata(what)
    if what in ("matmuls", "scaling"):
        run = matmuls if what == "matmuls" else scaling
        taken = matmul_dtype(torch.empty(0, device=device), dtype) if what == "matmuls" else dtype
        for record in run(setting.config, setting.images, setting.tokens_an_image, options.seconds, device, taken):
            yield metadata | record | machine(device)
        return
    for mode, candidate in make_candidates(what, make_module(what, setting), setting).items():
        (times,) = interleaved([candidate.run], options.seconds, device)
        record = metadata | {"mode": mode} | measurements(candidate, times, device, dtype)
        if what != "layer":
            record["images_per_second"] = setting.images / times.median
        yield record | machine(device)


def read_setting(what: What, options: BenchOptions) -> Setting:
    """The recipe and the device of some options.

    Raises:
        ValueError: see `measure`.
    """
    _check_options(what, options)
    recipe = read_recipe(options.recipe)
    config = recipe.model
    if config.router == "dense":
        raise ValueError(f"recipe {options.recipe} has no experts; choose one with a router")
    tokens_an_image = (config.sample_size // config.patch_size) ** 2
    if options.tokens % tokens_an_image:
        raise ValueError(f"tokens is {options.tokens}; give a multiple of an image's {tokens_an_image}")
    return Setting(
        replace(recipe, model=replace(config, expert_dropout=0.0)),
        options.tokens // tokens_an_image,
        tokens_an_image,
        choose_device(options.device),
        getattr(torch, options.dtype),
        options,
    )


def _check_options(what: What, options: BenchOptions) -> None:
    if options.recompute and what not in ("layer", "step"):
        raise ValueError(f"recompute is true, but {what} has no backward pass; remove it")
    if options.acceleration not in ACCELERATIONS.get(what, ("none",)):
        raise ValueError(f"acceleration is {options.acceleration}, which is not supported for {what}; remove it")
    if options.solver_steps != BenchOptions.solver_steps and what != "sample":
        raise ValueError(f"solver_steps is {options.solver_steps}, but only sample has a solver; remove it")
    for name in ("tokens", "dtype", "seconds"):
        if what == "waits" and getattr(options, name) != getattr(BenchOptions, name):
            raise ValueError(f"{name} is {getattr(options, name)}, but waits times nothing; remove it")


def make_module(what: What, setting: Setting) -> nn.Module:
    """The layer or the model that a case runs, with random weights."""
    torch.manual_seed(0)
    module = make_moe(setting.config) if what == "layer" else make_model(setting.config)
    return module.to(setting.device)


def make_candidates(what: What, module: nn.Module, setting: Setting) -> dict[str, Candidate]:
    """The runs of a case by mode."""
    if what == "layer":
        recompute_experts(module, setting.options.recompute)
        shape = (setting.images, setting.tokens_an_image, setting.config.hidden_size)
        return layer_candidates(module.train(), shape, setting.dtype)
    if what == "step":
        return {"step": _step(module, setting)}
    return {"sample": _sample(module.eval(), setting)}


def _step(model: Any, setting: Setting) -> Candidate:
    training = replace(
        setting.recipe.training,
        batch_size=setting.images,
        accumulation=1,
        extra_ema_decays=(),
        posthoc_ema_stds=(),
        precision="fp32" if setting.dtype == torch.float32 else "bf16",
        recompute="experts" if setting.options.recompute else "none",
        compile=setting.options.acceleration == "compile",
    )
    recipe, config = replace(setting.recipe, training=training), setting.config
    generator = torch.Generator().manual_seed(0)
    shape = (setting.images, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.randint(max(1, config.num_classes), (setting.images,), generator=generator)
    batch = Batch(torch.randn(shape, generator=generator), labels)
    if setting.device.type == "cuda":  # as the training loop's loader gives it
        batch = Batch(batch.images.pin_memory(), batch.labels.pin_memory())
    state = state_from_model(model, recipe, setting.device)
    return Candidate(lambda: train_step(state, recipe, batch))


def sampling_settings(setting: Setting) -> EvaluationConfig:
    """Settings with which `sample` generates its images."""
    config = setting.config
    settings = EvaluationConfig(
        num_samples=setting.images,
        batch_size=setting.images,
        steps=setting.options.solver_steps,
        solver="euler" if config.process == "flow" else "ddim",
        precision="fp32" if setting.dtype == torch.float32 else "bf16",
        acceleration=setting.options.acceleration,
    )
    return settings if config.num_classes and config.null_class else replace(settings, guidance_scale=1.0)


def _sample(model: Any, setting: Setting) -> Candidate:
    num_classes, images = setting.config.num_classes, setting.images
    labels = torch.arange(images) % num_classes if num_classes else None
    settings = sampling_settings(setting)
    plain = replace(settings, acceleration="none")
    return Candidate(
        lambda: generate(model, labels, images, settings),
        counted=lambda: generate(model, labels, images, plain),
    )
