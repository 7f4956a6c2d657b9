"""One optimizer step: loss, gradient, update, routing state, moving average."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Batch
from ..diffusion.loss import velocity_loss
from ..diffusion.path import rectified_flow
from ..diffusion.times import draw_times
from ..models import Backbone, make_model
from ..moe import RoutingReport, merge_reports, routers_of, update_routing_state
from ..randomness import normal, uniform
from .ema import update_ema
from .optimizer import learning_rate, make_optimizer


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; weights, moments and routing state are as before the step."""


@dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    model: Backbone
    ema: Backbone
    optimizer: torch.optim.AdamW
    step: int = 0
    """Steps done."""


class StepResult(NamedTuple):
    """What is worth logging of one step."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    router_losses: dict[str, float]
    """Already weighted, summed over layers."""
    imbalance: float
    """Load of the busiest expert over the mean load, averaged over layers; 1 is even, 0 without experts."""


def make_state(recipe: Recipe, device: torch.device) -> TrainState:
    """A fresh model, a function of the seed, with its average and optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        model = make_model(recipe.model)
    model.to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    return TrainState(model, ema, make_optimizer(model, recipe.optimizer))


class LossParts(NamedTuple):
    """The loss of one micro-batch."""

    velocity: Tensor
    routers: dict[str, Tensor]
    reports: tuple[RoutingReport, ...]

    def total(self) -> Tensor:
        return self.velocity + sum(self.routers.values())


def micro_batch_loss(model: Backbone, recipe: Recipe, batch: Batch, step: int, samples: Tensor) -> LossParts:
    """Loss on some of a step's samples; noise, time and label dropout are functions of (seed, step, sample).

    Args:
        samples: places of the images in the step's global batch, int64, (B,), on the model's device.
    """
    seed, device = recipe.training.seed, samples.device
    images = batch.images.to(device, non_blocking=True)
    t = draw_times(recipe.diffusion, seed, step, samples)
    noise = normal(seed, "noise", step, samples, tuple(images.shape[1:]))
    labels = None
    if model.null_class is not None:
        dropped = uniform(seed, "class_dropout", step, samples) < recipe.diffusion.class_dropout
        labels = torch.where(dropped, model.null_class, batch.labels.to(device, non_blocking=True))
    point = rectified_flow(images, noise, t)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        out = model(point.x_t, t, labels)
    names = sorted({name for report in out.routing for name in report.losses})
    routers = {name: torch.stack([r.losses[name] for r in out.routing if name in r.losses]).sum() for name in names}
    return LossParts(velocity_loss(out.sample, point.velocity).mean(), routers, out.routing)


def train_step(state: TrainState, recipe: Recipe, batch: Batch) -> StepResult:
    """Take one step and advance `state.step`.

    Raises:
        NonFiniteError: names the step; nothing in `state` has changed but the gradients.
    """
    step, model = state.step + 1, state.model
    lr = learning_rate(recipe.optimizer, step, recipe.training.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    parts = []
    for rows in torch.arange(len(batch.images)).chunk(recipe.training.accumulation):
        micro = Batch(batch.images[rows], batch.labels[rows])
        part = micro_batch_loss(model, recipe, micro, step, rows.to(model.device))
        (part.total() * (len(rows) / len(batch.images))).backward()
        parts.append(part)
    loss = torch.stack([part.velocity.detach() for part in parts]).mean()
    limit = recipe.optimizer.max_grad_norm or float("inf")
    # Clipping by a non-finite norm spoils the gradients, but not the weights: the check comes before the update.
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if not bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        raise NonFiniteError(f"step {step}: the loss is {float(loss)} and the gradient's norm {float(grad_norm)}")
    state.optimizer.step()
    reports = [merge_reports(layer) for layer in zip(*(part.reports for part in parts))]
    update_routing_state(routers_of(model), reports)
    update_ema(state.ema, model, recipe.training.ema_decay)
    state.step = step
    return StepResult(
        loss=float(loss),
        grad_norm=float(grad_norm),
        learning_rate=lr,
        router_losses={
            name: float(torch.stack([part.routers[name].detach() for part in parts]).mean())
            for name in parts[0].routers
        },
        imbalance=_imbalance(reports),
    )


def _imbalance(reports: list[RoutingReport]) -> float:
    if not reports:
        return 0.0
    counts_LE = torch.stack([report.counts_E for report in reports]).float()
    return float((counts_LE.max(dim=1).values / counts_LE.mean(dim=1)).mean())
