"""One optimizer step: loss, gradient, update, routing state, moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Batch
from ..diffusion.ddpm import ddpm_losses, linear_schedule, noised
from ..diffusion.loss import flow_loss
from ..diffusion.path import rectified_flow
from ..diffusion.times import draw_steps, draw_times
from ..models import Backbone, DiTOutput, make_model
from ..moe import RoutingReport, merge_reports, routers_of, update_routing_state
from ..randomness import derive_seed, normal, uniform
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

    diffusion: Tensor
    routers: dict[str, Tensor]
    reports: tuple[RoutingReport, ...]

    def total(self) -> Tensor:
        return self.diffusion + sum(self.routers.values())


def micro_batch_loss(model: Backbone, recipe: Recipe, batch: Batch, step: int, samples: Tensor) -> LossParts:
    """Loss on some of a step's samples; noise, time and label dropout are functions of (seed, step, sample).

    Args:
        samples: places of the images in the step's global batch, int64, (B,), on the model's device.
    """
    seed, device = recipe.training.seed, samples.device
    images = batch.images.to(device, non_blocking=True)
    noise = normal(seed, "noise", step, samples, tuple(images.shape[1:]))
    labels = None
    if recipe.model.num_classes:
        labels = batch.labels.to(device, non_blocking=True)
    if labels is not None and model.null_class is not None:
        dropped = uniform(seed, "class_dropout", step, samples) < recipe.diffusion.class_dropout
        labels = torch.where(dropped, model.null_class, labels)

    def answer(x_t: Tensor, t: Tensor) -> DiTOutput:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
            return model(x_t, t, labels)

    if recipe.model.process == "ddpm":
        schedule, t = linear_schedule(), draw_steps(seed, step, samples)
        out = answer(noised(schedule, images, noise, t), t)
        losses = ddpm_losses(out.sample.float(), images, noise, t, schedule)
        loss = losses.mse + losses.vb
    else:
        t = draw_times(recipe.diffusion, seed, step, samples)
        point = rectified_flow(images, recipe.model.noise_scale * noise, t)
        out = answer(point.x_t, t)
        loss = flow_loss(out.sample, point, recipe.model.prediction, recipe.diffusion.loss, recipe.model.min_gap)
    names = sorted({name for report in out.routing for name in report.losses})
    routers = {name: torch.stack([r.losses[name] for r in out.routing if name in r.losses]).sum() for name in names}
    return LossParts(loss.mean(), routers, out.routing)


def _seeded_dropout(recipe: Recipe, step: int, first: int) -> AbstractContextManager[None]:
    """Torch's generators seeded for one micro-batch, where the model has dropout.

    Its masks are a function of (seed, step, first sample of the micro-batch), so that a resumed run repeats them;
    unlike every other draw they change with the size of micro-batches.
    """
    model = recipe.model
    if not (model.dropout or model.attention_dropout or model.expert_dropout):
        return nullcontext()
    return _seeded(derive_seed(recipe.training.seed, "dropout", step * 2**20 + first))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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
        with _seeded_dropout(recipe, step, int(rows[0])):
            part = micro_batch_loss(model, recipe, micro, step, rows.to(model.device))
        (part.total() * (len(rows) / len(batch.images))).backward()
        parts.append(part)
    loss = torch.stack([part.diffusion.detach() for part in parts]).mean()
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
