"""What is measured: the layer, a training step, sampling; and what each is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import EvaluationConfig, Recipe, Solver
from ..data import Batch
from ..evaluation.generate import generate
from ..model_config import ModelConfig
from ..models import Backbone, make_model
from ..models.block import make_moe
from ..moe import MoEFeedForward, MoEOutput
from ..parsing import read_recipe
from ..training.optimizer import make_optimizer
from ..training.step import TrainState, train_step
from .loop import LoopMoE, dense_equivalent
from .measure import autocast, ceilings, flops, interleaved, kernels, machine, operators, peak_bytes, saved_bytes
from .options import Against, BenchOptions

STEPS = 4
"""Solver steps of the sampling benchmark."""


@dataclass(frozen=True)
class Contestant:
    """Something to time, and what is worth counting of it."""

    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    """The part whose saved tensors count."""
    parameters: tuple[Tensor, ...] = ()


def measure(what: Literal["layer", "step", "sample"], options: BenchOptions) -> Iterator[dict[str, Any]]:
    """One record a measurement, ready for JSON.

    Raises:
        ValueError: the recipe has no experts, or the tokens do not make whole images.
    """
    recipe = read_recipe(options.recipe)
    config = recipe.model
    if config.router == "dense":
        raise ValueError(f"recipe {options.recipe} has no experts; choose one with a router")
    tokens_an_image = (config.sample_size // config.patch_size) ** 2
    if options.tokens % tokens_an_image:
        raise ValueError(f"tokens is {options.tokens}; give a multiple of an image's {tokens_an_image}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no CUDA device is available; set it to auto or cpu")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    images = options.tokens // tokens_an_image
    about = {"recipe": options.recipe, "tokens": options.tokens, "images": images, "dtype": options.dtype}
    if what == "layer":
        pairs = _layer(config, options.against, images, tokens_an_image, device, dtype)
    elif what == "step":
        pairs = _step(recipe, options.against, images, device, options.dtype)
    else:
        pairs = _sample(config, options.against, images, device, dtype)
    for mode, ours, theirs in pairs:
        record = {"benchmark": what, "mode": mode, **about, "against": options.against}
        yield record | _compare(ours, theirs, options.seconds, device, dtype) | machine(device)


def _compare(
    ours: Contestant, theirs: Contestant, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    times = interleaved([ours.run, theirs.run], seconds, device)
    record: dict[str, Any] = {"ratio": times[1].median / times[0].median}
    for prefix, contestant, time in zip(("", "against_"), (ours, theirs), times):
        called, waits = operators(contestant.run)
        record[f"{prefix}ms"] = 1e3 * time.median
        record[f"{prefix}ms_quartiles"] = [1e3 * time.low, 1e3 * time.high]
        if contestant.forward is not None:
            record[f"{prefix}saved_bytes"] = saved_bytes(contestant.forward, contestant.parameters)
        record[f"{prefix}peak_bytes"] = peak_bytes(contestant.run, device)
        record |= {f"{prefix}operators": called, f"{prefix}waits": waits}
        record[f"{prefix}kernels"] = kernels(contestant.run, device)
    if record.get("saved_bytes"):
        record["memory_ratio"] = record["against_saved_bytes"] / record["saved_bytes"]
    record["peak_ratio"] = record["against_peak_bytes"] / max(1, record["peak_bytes"])
    limits = ceilings(device, dtype)
    record["flops"] = flops(ours.run)
    record["flops_per_second"] = record["flops"] / times[0].median
    record["utilisation"] = record["flops_per_second"] / limits.matmul_flops
    return record | {"matmul_ceiling": limits.matmul_flops, "copy_ceiling": limits.copy_bytes}


Pairs = Iterator[tuple[str, Contestant, Contestant]]


def _rival(layer: MoEFeedForward, config: ModelConfig, against: Against) -> nn.Module:
    if against == "loop":
        return LoopMoE(copy.deepcopy(layer))
    experts_a_token = config.top_k if config.router in ("tc", "dsmoe") else config.capacity
    return dense_equivalent(layer, experts_a_token)


def _layer(
    config: ModelConfig, against: Against, images: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Pairs:
    torch.manual_seed(0)
    layer = make_moe(config).train()
    rival = _rival(layer, config, against).train()
    x = torch.randn(images, tokens, config.hidden_size, device=device, requires_grad=True)
    direction = torch.randn(images, tokens, config.hidden_size, device=device)
    contestants = [_layer_contestants(module.to(device), x, direction, dtype) for module in (layer, rival)]
    for mode in ("forward", "forward+backward"):
        yield mode, contestants[0][mode], contestants[1][mode]


def _layer_contestants(module: nn.Module, x: Tensor, direction: Tensor, dtype: torch.dtype) -> dict[str, Contestant]:
    parameters = tuple(module.parameters())

    def forward() -> tuple[Tensor, ...]:
        with autocast(x.device, dtype):
            out = module(x)
        return (out.hidden_states, *out.report.losses.values()) if isinstance(out, MoEOutput) else (out,)

    def both() -> None:
        y, *losses = forward()
        total = torch.linalg.vecdot(y.float().flatten(), direction.flatten())
        (total + sum(losses)).backward()
        for parameter in (*parameters, x):
            parameter.grad = None

    return {
        "forward": Contestant(forward, forward, parameters),
        "forward+backward": Contestant(both, forward, parameters),
    }


def replace_mixtures(model: Backbone, against: Against) -> Backbone:
    """The model with every MoE layer in its rival's form, in place."""
    for block in model.blocks:
        if isinstance(block.mlp, MoEFeedForward):
            block.mlp = _rival(block.mlp, model.settings, against).to(model.device)
    return model


def _models(config: ModelConfig, against: Against, device: torch.device) -> tuple[Backbone, Backbone]:
    torch.manual_seed(0)
    model = make_model(config).to(device)
    return model, replace_mixtures(copy.deepcopy(model), against)


def _step(recipe: Recipe, against: Against, images: int, device: torch.device, dtype: str) -> Pairs:
    training = replace(recipe.training, batch_size=images, precision="fp32" if dtype == "float32" else "bf16")
    recipe, config = replace(recipe, training=training), recipe.model
    generator = torch.Generator().manual_seed(0)
    shape = (images, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.randint(max(1, config.num_classes), (images,), generator=generator)
    batch = Batch(torch.randn(shape, generator=generator), labels)
    contestants = []
    for model in _models(config, against, device):
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        state = TrainState(model.train(), ema, make_optimizer(model, recipe.optimizer))
        contestants.append(Contestant(lambda state=state: train_step(state, recipe, batch)))  # type: ignore[misc]
    yield "step", contestants[0], contestants[1]


def _sample(config: ModelConfig, against: Against, images: int, device: torch.device, dtype: torch.dtype) -> Pairs:
    solver: Solver = "euler" if config.process == "flow" else "ddim"
    settings = EvaluationConfig(num_samples=images, batch_size=images, steps=STEPS, solver=solver)
    labels = torch.arange(images) % config.num_classes if config.num_classes else None
    if labels is None or not config.null_class:
        settings = replace(settings, guidance_scale=1.0)

    def contestant(model: Backbone) -> Contestant:
        def run() -> None:
            with autocast(device, dtype):
                generate(model, labels, images, settings)

        return Contestant(run)

    model, rival = _models(config, against, device)
    yield "sample", contestant(model.eval()), contestant(rival.eval())
