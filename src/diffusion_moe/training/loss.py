"""The loss of a micro-batch: diffusion loss of each image, and losses of routers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig, Recipe
from ..data import Batch
from ..diffusion.ddpm import DDPM_STEPS, ddpm_losses, linear_schedule, noised
from ..diffusion.loss import flow_loss
from ..diffusion.path import rectified_flow
from ..diffusion.times import sample_steps, sample_times
from ..models import Backbone, DiTOutput
from ..models.token_drop import NOTHING_DROPPED, TokenDrop
from ..moe import RoutingReport
from ..moe.precision import choose_precision, full_precision
from ..nn.embeddings import patchify
from ..randomness import normal, uniform
from ..text import TextFeatures
from .token_drop import choose_drop


class LossParts(NamedTuple):
    """The loss of one micro-batch."""

    diffusion_B: Tensor
    """Diffusion loss of each image."""
    time_B: Tensor
    """Time of each image in [0, 1]: t of a flow, the step over 1000 of ddpm."""
    routers: dict[str, Tensor]
    """Router losses by name, weighted, summed over layers."""
    reports: tuple[RoutingReport, ...]

    @property
    def diffusion(self) -> Tensor:
        """Mean diffusion loss over the images."""
        return self.diffusion_B.mean()

    def total(self) -> Tensor:
        """The loss to differentiate."""
        return self.diffusion + sum(self.routers.values())


def micro_batch_loss(model: Backbone, recipe: Recipe, batch: Batch, step: int, samples: Tensor) -> LossParts:
    """Loss of some of a step's images; noise, times and all that is dropped are functions of (seed, step, sample).

    Args:
        batch: the images, with labels or text.
        step: number of the step, from 1.
        samples: indices of the images in the step's global batch, int64, (B,), on the model's device.
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
    text = None
    if recipe.model.text_dim:
        assert batch.text is not None
        dropped = uniform(seed, "class_dropout", step, samples) < recipe.diffusion.caption_dropout
        text = batch.text.to(device).dropped(dropped)
    if recipe.model.process == "ddpm":
        t = sample_steps(seed, step, samples)
    else:
        t = sample_times(recipe.diffusion, seed, step, samples)
    drop = choose_drop(recipe, step, samples, model.grid(images))
    return loss_at(model, recipe, images, labels, noise, t, text, drop)


def loss_at(
    model: Backbone,
    recipe: Recipe,
    images: Tensor,
    labels: Tensor | None,
    noise: Tensor,
    t: Tensor,
    text: TextFeatures | None = None,
    drop: TokenDrop = NOTHING_DROPPED,
) -> LossParts:
    """Loss for given noise and times; with ddpm, `t` are steps."""
    prompt = {} if text is None else text.arguments(recipe.model.text_pooled_dim > 0)
    dropped = {} if drop is NOTHING_DROPPED else {"token_drop": drop}

    def predict(x_t: Tensor) -> DiTOutput:
        bf16 = choose_precision(recipe.training.precision, images.device).precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else full_precision(images):
            return model(x_t, t, labels, **prompt, **dropped)

    if recipe.model.process == "ddpm":
        schedule = linear_schedule()
        out = predict(noised(schedule, images, noise, t))
        losses = ddpm_losses(out.sample.float(), images, noise, t, schedule)
        loss, time, target = losses.mse + losses.vb, t / DDPM_STEPS, noise
    else:
        point = rectified_flow(images, recipe.model.noise_scale * noise, t)
        out, time, target = predict(point.x_t), t, getattr(point, recipe.model.prediction)
        loss = flow_loss(out.sample, point, recipe.model.prediction, recipe.diffusion.loss, recipe.loss_min_gap)
    reports = tuple(_with_target_loss(report, target, recipe.model) for report in out.routing)
    names = sorted({name for report in reports for name in report.losses})
    routers = {name: torch.stack([r.losses[name] for r in reports if name in r.losses]).sum() for name in names}
    return LossParts(loss, time, routers, reports)


def _with_target_loss(report: RoutingReport, target: Tensor, model: ModelConfig) -> RoutingReport:
    """The report with the loss of the target that its router predicted, if it did, in place of the prediction."""
    if report.predicted_BNP is None:
        return report
    error_BNP = report.predicted_BNP - patchify(target, model.patch_size)
    # Expert Race section 6: the L2 loss of each layer; the paper leaves open whether layers are averaged.
    loss = model.target_loss_weight * error_BNP.square().mean()
    return report._replace(losses=report.losses | {"target": loss}, predicted_BNP=None)
