"""One optimizer step: loss, gradient, update, routing state, EMA.

The host never waits for the device in a step: the device decides whether the gradient is finite, and metrics are copied
to the host in the background.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Batch
from ..distributed import all_gather, all_reduce_sum, world_size
from ..log import Log
from ..models import Backbone
from ..moe import RoutingReport, merge_reports, routers_of, set_training_capacity, update_routing_state
from ..randomness import derive_seed
from .ema import ema_decay, power_decay, update_ema
from .loss import LossParts, micro_batch_loss
from .measures import HostCopy, loss_by_time, routing_measures
from .optimizer import clip_, global_norm, learning_rate
from .state import TrainState


class StepResult(NamedTuple):
    """Metrics of one step; reading one waits until it is on the host."""

    step: int
    learning_rate: float
    numbers: HostCopy
    """loss, grad_norm (before clipping), finite, stop, skipped_images, `loss_NAME` of each router loss (already
    weighted, summed over layers), and with `detailed` what `measures` adds."""

    @property
    def loss(self) -> float:
        """Diffusion loss, mean over the global batch."""
        return self.numbers.read()["loss"]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return self.numbers.read()["grad_norm"]

    @property
    def finite(self) -> bool:
        """True if the step was taken; else weights, moments and routing state are unchanged."""
        return self.numbers.read()["finite"] > 0

    @property
    def stop(self) -> bool:
        """True if a process asked to stop."""
        return self.numbers.read()["stop"] > 0

    @property
    def skipped_images(self) -> int:
        """Number of unreadable images in the global batch, which others replace."""
        return round(self.numbers.read()["skipped_images"])


@contextmanager
def _seeded_dropout(recipe: Recipe, step: int, first: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for one micro-batch, if the model has dropout.

    Its masks are a function of (seed, step, first sample of the micro-batch), so that a resumed run repeats them;
    unlike all other random numbers they change with the size of micro-batches.
    """
    model = recipe.model
    if not (model.dropout or model.attention_dropout or model.expert_dropout):
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # not the GPUs of other processes
        torch.manual_seed(derive_seed(recipe.training.seed, "dropout", step * 2**20 + first))
        yield


def train_step(
    state: TrainState,
    recipe: Recipe,
    batch: Batch,
    stop: bool = False,
    detailed: bool = False,
    lap: Log = lambda name: None,
) -> StepResult:
    """Take one step and advance `state.step`.

    A step whose loss or gradient is not finite changes only the step number and the EMAs, which move towards the
    unchanged weights.

    Args:
        batch: this process' share of the global batch.
        stop: this process wants to stop; the result's `stop` is then True on all.
        detailed: measure more, see `measures`.
        lap: called with `forward`, `backward` or `optimizer` after each of these parts.
    """
    step, model = state.step + 1, state.model
    lr = learning_rate(recipe.optimizer, step, recipe.training.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    set_training_capacity(model, recipe.capacity_at(step))
    parts = _accumulate_gradients(state, recipe, batch, step, lap)
    loss = torch.stack([part.diffusion.detach() for part in parts]).mean()
    routers = {
        f"loss_{name}": torch.stack([part.routers[name].detach() for part in parts]).mean() for name in parts[0].routers
    }
    gradients = state.optimizer.take_gradients()
    requests = {
        "stop": torch.full_like(loss, float(stop)),
        "skipped_images": torch.full_like(loss, float(batch.skipped * world_size())),
    }
    means = _mean_over_processes({"loss": loss, **routers, **requests})
    grad_norm = global_norm(gradients, replicas=1 if state.meshes is None else state.meshes.replicas)
    finite = torch.isfinite(means["loss"]) & torch.isfinite(grad_norm)
    clip_(gradients, grad_norm, recipe.optimizer.max_grad_norm)
    state.optimizer.step_if(finite)
    reports = reports_over_processes([merge_reports(layer) for layer in zip(*(part.reports for part in parts))])
    _update_routing(model, reports, finite)
    for decay, ema in {recipe.training.ema_decay: state.ema, **state.extra_emas}.items():
        update_ema(ema, model, ema_decay(decay, step - 1, recipe.training.ema_warmup))
    for std, ema in state.posthoc_emas.items():
        update_ema(ema, model, power_decay(std, step))
    lap("optimizer")
    state.step = step
    numbers = {**means, "grad_norm": grad_norm, "finite": finite}
    if detailed:
        numbers |= loss_by_time([(part.time_B, part.diffusion_B.detach()) for part in parts])
        numbers |= routing_measures(reports)
    return StepResult(step, lr, HostCopy(numbers))


def _accumulate_gradients(state: TrainState, recipe: Recipe, batch: Batch, step: int, lap: Log) -> list[LossParts]:
    model, accumulation = state.model, recipe.training.accumulation
    micro_batches = batch.micro_batches(accumulation)
    firsts = [int(samples[0]) for samples in batch.samples(torch.device("cpu")).chunk(accumulation)]
    samples_on_device = batch.samples(model.device).chunk(accumulation)
    model.zero_grad(set_to_none=True)
    parts = []
    for number, (micro, first, samples) in enumerate(zip(micro_batches, firsts, samples_on_device), start=1):
        if state.meshes is not None:  # gradients are reduced once a step
            model.set_requires_gradient_sync(number == len(micro_batches))
        with _seeded_dropout(recipe, step, first, model.device):
            part = micro_batch_loss(model, recipe, micro, step, samples)
        lap("forward")
        (part.total() * (len(micro.images) / len(batch.images))).backward()
        lap("backward")
        parts.append(part)
    return parts


@torch.no_grad()
def _update_routing(model: Backbone, reports: Sequence[RoutingReport], finite: Tensor) -> None:
    # A frozen router keeps its state too: the base model of an adapter must not change.
    learning = [any(p.requires_grad for p in router.parameters()) for router in routers_of(model)]
    routers = [router for router, learns in zip(routers_of(model), learning) if learns]
    before = [(buffer, buffer.clone()) for router in routers for buffer in router.buffers()]
    update_routing_state(routers, [report for report, learns in zip(reports, learning) if learns])
    for buffer, old in before:
        buffer.copy_(torch.where(finite, buffer, old))


def _mean_over_processes(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    means = all_reduce_sum(torch.stack([number.float() for number in numbers.values()])) / world_size()
    return dict(zip(numbers, means))


def reports_over_processes(reports: Sequence[RoutingReport]) -> list[RoutingReport]:
    """Reports of the global batch: counts are summed, thresholds averaged, scores gathered."""
    world = world_size()
    if world == 1 or not reports:
        return list(reports)
    counts_LE = all_reduce_sum(torch.stack([report.counts_E for report in reports]))
    thresholds = [report.threshold_E for report in reports if report.threshold_E is not None]
    thresholds_LE = all_reduce_sum(torch.stack(thresholds)) / world if thresholds else [None] * len(reports)
    reports = [
        report._replace(counts_E=counts_E, threshold_E=threshold_E, num_tokens=world * report.num_tokens)
        for report, counts_E, threshold_E in zip(reports, counts_LE, thresholds_LE)
    ]
    return [
        report if report.scores_TE is None else report._replace(scores_TE=all_gather(report.scores_TE))
        for report in reports
    ]
