"""Waits of the host for the device, in a training step and in an evaluation of the sampler."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import InitConfig, ModelConfig, ParallelConfig, Recipe, read_recipe
from ..data import Batch
from ..distributed import choose_device
from ..models import make_model
from ..moe import limit_capacity, scale_thresholds
from ..sampling.acceleration import accelerated
from ..sampling.generate import Prompts, SamplingStats, guided_network, solve
from ..text import TextFeatures
from ..training.state import TrainState, state_from_model
from ..training.step import train_step
from .options import BenchOptions
from .wait_trace import Device, Gpu, StandIn, Wait

IMAGES = 4
"""Images of a micro-batch."""


def waits(options: BenchOptions) -> dict[str, Any]:
    """Waits of a small model of the recipe's kind: `waits` in training, `sampling_waits`, and `places` of both."""
    chosen = choose_device(options.device)
    device = Gpu(chosen) if chosen.type == "cuda" else StandIn()
    recipe = small(read_recipe(options.recipe), "bf16" if chosen.type == "cuda" else "fp32")
    torch.manual_seed(0)
    state = state_from_model(make_model(recipe.model), recipe, device.device)
    found = {"training": step_waits(state, recipe, device), "sampling": sampling_waits(state, recipe, device)}
    counted = Counter((phase, wait) for phase, waits in found.items() for wait in waits)
    return {
        "benchmark": "waits",
        "recipe": options.recipe,
        "waits": len(found["training"]),
        "sampling_waits": len(found["sampling"]),
        "places": [
            {"in": phase, "at": f"{wait.file}:{wait.line}", "kind": wait.kind, "times": times}
            for (phase, wait), times in counted.items()
        ],
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else device.device.type,
        "torch": torch.__version__,
    }


def small(recipe: Recipe, precision: Any) -> Recipe:
    """The recipe with a small model of its kind: the same layers, rules and losses, with other sizes."""
    model = recipe.model
    experts = max(4, 2 * model.n_group, 2 * model.top_k)
    model = replace(
        model,
        sample_size=4 * min(model.patch_size, 4),
        patch_size=min(model.patch_size, 4),
        hidden_size=64,
        depth=4 if model.fusion or recipe.training.token_drop_rate else 2,
        first_k_full=min(model.first_k_full, 1),
        last_k_full=min(model.last_k_full, 1),
        num_heads=2,
        num_kv_heads=None if model.num_kv_heads is None else 1,
        head_dim=None,
        mlp_dim=None if model.mlp_dim is None else 64,
        bottleneck_dim=None if model.bottleneck_dim is None else 16,
        class_tokens=min(model.class_tokens, 2),
        class_tokens_from=min(model.class_tokens_from, 1),
        num_classes=min(model.num_classes, 10),
        text_dim=min(model.text_dim, 16),
        text_length=min(model.text_length, 8) if model.text_dim else model.text_length,
        text_pooled_dim=min(model.text_pooled_dim, 16),
        num_experts=experts + -experts % model.n_group,
        expert_dim=64,
        shared_dim=None if model.shared_dim is None else 64,
        moe_layer_freq=min(model.moe_layer_freq, 2),
        first_k_dense=min(model.first_k_dense, 1),
        last_k_dense=0,
        layer_capacities=None,
        time_boundaries=None,
    )
    training = replace(
        recipe.training, batch_size=2 * IMAGES, accumulation=2, precision=precision, compile=False, device="auto"
    )
    evaluation = replace(recipe.evaluation, steps=2, precision=precision, acceleration="none")
    if evaluation.solver == "dopri5":  # it reads its error after each step
        evaluation = replace(evaluation, solver="euler")
    return replace(
        recipe,
        model=model,
        training=training,
        evaluation=evaluation,
        init=InitConfig(),
        parallel=ParallelConfig(),
    )


def step_waits(state: TrainState, recipe: Recipe, device: Device) -> list[Wait]:
    """Waits of one training step, after one of a single micro-batch; the batch is pinned, as the loader gives it."""
    state.optimizer.named_moments()  # makes the moments, which the first step would
    first = replace(recipe, training=replace(recipe.training, accumulation=1))
    with device.trace():
        batch = pinned(random_batch(recipe.model))
        train_step(state, first, batch.micro_batches(recipe.training.accumulation)[0], detailed=True)
    with device.trace() as waits:
        train_step(state, recipe, batch, detailed=True)
    return waits


@torch.no_grad()
def sampling_waits(state: TrainState, recipe: Recipe, device: Device) -> list[Wait]:
    """Waits of the solver's steps with guidance, after the same steps; a batch's inputs are on the device."""
    config, settings, batch = recipe.model, recipe.evaluation, random_batch(recipe.model)
    if not config.guidable:
        settings = replace(settings, guidance_scale=1.0)
    labels = batch.labels.to(device.device) if config.num_classes else None
    with device.trace():
        text = None if batch.text is None else batch.text.to(device.device)
    prompts = None if text is None else Prompts(text, text.nothing())
    samples = torch.arange(len(batch.images), device=device.device)
    network = accelerated(state.ema, settings)
    call = guided_network(config, network, labels, prompts, settings, SamplingStats())
    shape = tuple(batch.images.shape[1:])
    scale_thresholds(state.ema, settings.threshold_scale)
    limit_capacity(state.ema, settings.capacity_limit)
    with device.trace():
        solve(call, config, settings, samples, shape)
    with device.trace() as waits:
        solve(call, config, settings, samples, shape)
    return waits


def random_batch(config: ModelConfig) -> Batch:
    """Random images with labels, positions and texts."""
    count = 2 * IMAGES
    images = torch.randn(count, config.in_channels, config.sample_size, config.sample_size)
    text = None
    if config.text_dim:  # float16, as caches have it
        features = torch.randn(count, config.text_length, config.text_dim, dtype=torch.float16)
        pooled = torch.randn(count, config.text_pooled_dim).half() if config.text_pooled_dim else None
        text = TextFeatures(features, torch.ones(features.shape[:2], dtype=torch.bool), pooled)
    labels = torch.arange(count) % max(1, config.num_classes)
    return Batch(images, labels, positions=torch.arange(count), text=text)


def pinned(value: Any) -> Any:
    """A named tuple with its tensors in pinned memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return type(value)(*map(pinned, value)) if isinstance(value, Batch | TextFeatures) else value
