"""One optimizer step: loss, gradient, update, routing state, moving average.

The host never waits for the device in a step: whether the gradient is finite decides on the device, and numbers come
over in the background.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Batch, Segment
from ..diffusion.ddpm import ddpm_losses, linear_schedule, noised
from ..diffusion.loss import flow_loss
from ..diffusion.path import rectified_flow
from ..diffusion.times import sample_steps, sample_times
from ..distributed import all_reduce_sum, world_size
from ..models import Backbone, DiTOutput, make_model
from ..moe import RoutingReport, merge_reports, recompute_experts, routers_of, update_routing_state
from ..moe.precision import choose_precision
from ..randomness import derive_seed, normal, uniform
from ..text import TextFeatures
from .ema import ema_decay, update_ema
from .initialization import freeze_and_add_adapters, share_frozen
from .measures import HostCopy, loss_by_time, routing_measures
from .optimizer import LocalAdamW, clip_, global_norm, learning_rate, make_optimizer
from .parallelize import Layout, parallelize

DDPM_STEPS = 1000


@dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    model: Backbone
    ema: Backbone
    optimizer: LocalAdamW
    step: int = 0
    """Steps done."""
    layout: Layout | None = None
    """Where the processes stand; None for a single one."""
    extra_emas: dict[float, Backbone] = field(default_factory=dict)
    """Further averages by decay."""
    skipped_steps: set[int] = field(default_factory=set)
    """Steps whose batches are left out, for they spoiled the loss."""
    bad: list[int] = field(default_factory=list)
    """Steps that were not finite since the last one that was."""
    segments: tuple[Segment, ...] = ()
    """How many images the steps so far and the next ones take; see `data.order`."""
    rolled_back: bool = False
    """Whether training has gone back, and no step beyond those left out has been good since."""

    def become(self, make: Callable[[], TrainState]) -> None:
        """Become another state, which is made when the memory of this one is free."""
        vars(self).clear()
        gc.collect()  # modules that FSDP2 spreads refer to themselves
        vars(self).update(vars(make()))


class StepResult(NamedTuple):
    """What is worth logging of one step; reading a number waits until it has come to the host."""

    step: int
    learning_rate: float
    numbers: HostCopy
    """loss, grad_norm (before clipping), finite, stop, skipped_images, `loss_NAME` of each router loss (already
    weighted, summed over layers), and with `detailed` what `measures` adds."""

    @property
    def loss(self) -> float:
        """Of the diffusion, mean over the global batch."""
        return self.numbers.read()["loss"]

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self.numbers.read()["grad_norm"]

    @property
    def finite(self) -> bool:
        """Whether the step was taken; if not, weights, moments and routing state are as before."""
        return self.numbers.read()["finite"] > 0

    @property
    def stop(self) -> bool:
        """Whether a process asked to stop."""
        return self.numbers.read()["stop"] > 0

    @property
    def skipped_images(self) -> int:
        """Unreadable images of the global batch that others stand in for."""
        return round(self.numbers.read()["skipped_images"])


def make_state(
    recipe: Recipe,
    device: torch.device,
    layout: Layout | None = None,
    fill: Callable[[Backbone], None] | None = None,
    empty_prompt: TextFeatures | None = None,
) -> TrainState:
    """A fresh model, a function of the seed, with its averages and optimizer.

    Args:
        fill: gives the model other weights, if the recipe says so (see `start`).
        empty_prompt: what model.text_null empty takes for no prompt.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        model = make_model(recipe.model)
        if recipe.model.text_dim and recipe.model.text_null == "empty":
            assert model.text_embedder is not None and empty_prompt is not None
            empty = empty_prompt.to(torch.device("cpu"))
            model.text_embedder.set_null(empty.features[0], None if empty.pooled is None else empty.pooled[0])
        if fill is not None:
            fill(model)
        freeze_and_add_adapters(model, recipe.init)
    state = state_of(model, recipe, device, layout)
    if layout is None:
        share_frozen(state.model, [state.ema, *state.extra_emas.values()])
    return state


def state_of(model: Backbone, recipe: Recipe, device: torch.device, layout: Layout | None = None) -> TrainState:
    """The state of training at its beginning, for a model of any origin."""
    training = recipe.training

    def placed(model: Backbone) -> Backbone:
        # Spread part by part from where it is: no process needs room on its device for the whole.
        if layout is not None:
            parallelize(model, recipe, layout)
        return model.to(device)

    averages = [
        placed(copy.deepcopy(model).eval().requires_grad_(False))
        for _ in (training.ema_decay, *training.extra_ema_decays)
    ]
    if training.recompute == "blocks":
        model.enable_gradient_checkpointing()
    recompute_experts(model, training.recompute == "experts")
    if training.compile:
        model.compile_blocks(fullgraph=layout is None)
    model = placed(model.train())
    more = dict(zip(training.extra_ema_decays, averages[1:]))
    state = TrainState(model, averages[0], make_optimizer(model, recipe.optimizer), layout=layout, extra_emas=more)
    state.segments = (Segment(0, training.batch_size),)
    return state


class LossParts(NamedTuple):
    """The loss of one micro-batch."""

    diffusion_B: Tensor
    """Of each image."""
    time_B: Tensor
    """Its time in [0, 1]: t of a flow, the step over 1000 of ddpm."""
    routers: dict[str, Tensor]
    reports: tuple[RoutingReport, ...]

    @property
    def diffusion(self) -> Tensor:
        """The mean over the images."""
        return self.diffusion_B.mean()

    def total(self) -> Tensor:
        """What the gradient is taken of."""
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
    text = None
    if recipe.model.text_dim:
        assert batch.text is not None
        dropped = uniform(seed, "class_dropout", step, samples) < recipe.diffusion.caption_dropout
        text = batch.text.to(device, non_blocking=True).dropped(dropped)
    if recipe.model.process == "ddpm":
        t = sample_steps(seed, step, samples)
    else:
        t = sample_times(recipe.diffusion, seed, step, samples)
    return loss_at(model, recipe, images, labels, noise, t, text)


def loss_at(
    model: Backbone,
    recipe: Recipe,
    images: Tensor,
    labels: Tensor | None,
    noise: Tensor,
    t: Tensor,
    text: TextFeatures | None = None,
) -> LossParts:
    """Loss for given noise and times (of ddpm, steps)."""
    prompt = {} if text is None else text.arguments(recipe.model.text_pooled_dim > 0)

    def answer(x_t: Tensor) -> DiTOutput:
        bf16 = choose_precision(recipe.training.precision, images.device).precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return model(x_t, t, labels, **prompt)

    if recipe.model.process == "ddpm":
        schedule = linear_schedule()
        out = answer(noised(schedule, images, noise, t))
        losses = ddpm_losses(out.sample.float(), images, noise, t, schedule)
        loss, time = losses.mse + losses.vb, t / DDPM_STEPS
    else:
        point = rectified_flow(images, recipe.model.noise_scale * noise, t)
        out, time = answer(point.x_t), t
        loss = flow_loss(out.sample, point, recipe.model.prediction, recipe.diffusion.loss, recipe.loss_min_gap)
    names = sorted({name for report in out.routing for name in report.losses})
    routers = {name: torch.stack([r.losses[name] for r in out.routing if name in r.losses]).sum() for name in names}
    return LossParts(loss, time, routers, out.routing)


def _seeded_dropout(recipe: Recipe, step: int, first: int, device: torch.device) -> AbstractContextManager[None]:
    """Torch's generators seeded for one micro-batch, where the model has dropout.

    Its masks are a function of (seed, step, first sample of the micro-batch), so that a resumed run repeats them;
    unlike every other draw they change with the size of micro-batches.
    """
    model = recipe.model
    if not (model.dropout or model.attention_dropout or model.expert_dropout):
        return nullcontext()
    return _seeded(derive_seed(recipe.training.seed, "dropout", step * 2**20 + first), device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # not those of other processes
        torch.manual_seed(seed)
        yield


def train_step(
    state: TrainState,
    recipe: Recipe,
    batch: Batch,
    stop: bool = False,
    detailed: bool = False,
    lap: Callable[[str], None] = lambda name: None,
) -> StepResult:
    """Take one step and advance `state.step`.

    A step whose loss or gradient is not finite changes nothing but the step number and the averages, which move on
    towards the weights as they are.

    Args:
        batch: this process' share of the global batch. stop: this process wants to stop; all learn of it.
        detailed: measure more, see `measures`. lap: told after each forward, backward and optimizer part.
    """
    step, model = state.step + 1, state.model
    lr = learning_rate(recipe.optimizer, step, recipe.training.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    parts = _accumulate_gradients(state, recipe, batch, step, lap)
    loss = torch.stack([part.diffusion.detach() for part in parts]).mean()
    routers = {
        f"loss_{name}": torch.stack([part.routers[name].detach() for part in parts]).mean() for name in parts[0].routers
    }
    gradients = state.optimizer.take_gradients()
    told = {"stop": float(stop), "skipped_images": float(batch.skipped * world_size())}
    means = _mean_over_processes({"loss": loss, **routers, **{name: loss.new_tensor(x) for name, x in told.items()}})
    grad_norm = global_norm(gradients, replicas=1 if state.layout is None else state.layout.dense.size(0))
    finite = torch.isfinite(means["loss"]) & torch.isfinite(grad_norm)
    clip_(gradients, grad_norm, recipe.optimizer.max_grad_norm)
    state.optimizer.step_if(finite)
    reports = reports_over_processes([merge_reports(layer) for layer in zip(*(part.reports for part in parts))])
    _update_routing(model, reports, finite)
    for decay, ema in {recipe.training.ema_decay: state.ema, **state.extra_emas}.items():
        update_ema(ema, model, ema_decay(decay, step - 1, recipe.training.ema_warmup))
    lap("optimizer")
    state.step = step
    numbers = {**means, "grad_norm": grad_norm, "finite": finite}
    if detailed:
        numbers |= loss_by_time([(part.time_B, part.diffusion_B.detach()) for part in parts])
        numbers |= routing_measures(reports)
    return StepResult(step, lr, HostCopy(numbers))


def _accumulate_gradients(
    state: TrainState, recipe: Recipe, batch: Batch, step: int, lap: Callable[[str], None]
) -> list[LossParts]:
    model, count = state.model, len(batch.images)
    places = torch.arange(count) if batch.positions is None else batch.positions
    model.zero_grad(set_to_none=True)
    parts = []
    micro_batches = torch.arange(count).chunk(recipe.training.accumulation)
    for number, rows in enumerate(micro_batches, start=1):
        if state.layout is not None:  # gradients travel once a step
            model.set_requires_gradient_sync(number == len(micro_batches))
        text = None if batch.text is None else batch.text.rows(rows)
        micro = Batch(batch.images[rows], batch.labels[rows], text=text)
        with _seeded_dropout(recipe, step, int(places[rows[0]]), model.device):
            part = micro_batch_loss(model, recipe, micro, step, places[rows].to(model.device))
        lap("forward")
        (part.total() * (len(rows) / count)).backward()
        lap("backward")
        parts.append(part)
    return parts


@torch.no_grad()
def _update_routing(model: Backbone, reports: Sequence[RoutingReport], finite: Tensor) -> None:
    # A frozen router keeps its state too: the base of an adapter must stay as it was.
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
    """Reports of the global batch: counts added up, thresholds averaged."""
    world = world_size()
    if world == 1 or not reports:
        return list(reports)
    counts_LE = all_reduce_sum(torch.stack([report.counts_E for report in reports]))
    thresholds = [report.threshold_E for report in reports if report.threshold_E is not None]
    thresholds_LE = all_reduce_sum(torch.stack(thresholds)) / world if thresholds else [None] * len(reports)
    return [
        report._replace(counts_E=counts_E, threshold_E=threshold_E, num_tokens=world * report.num_tokens)
        for report, counts_E, threshold_E in zip(reports, counts_LE, thresholds_LE)
    ]
