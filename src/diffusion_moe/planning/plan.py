"""The plan of a recipe: compute, memory, disk and time on given processes, and their possible layouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from .. import counts
from ..config import ParallelConfig, Recipe
from ..training.layout_checks import check_adapters, check_parallel
from .activations import kept_activations
from .memory import Memory, Tensors, received_bytes
from .options import PlanOptions

ROOM = 0.9
"""Share of a GPU's memory that a plan may take; temporaries and the allocator need the rest."""


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of one step, over all processes: matmuls alone, two operations a multiply-add.

    Where steps drop tokens it is the mean over all steps; where the capacity has a schedule, that of the mean capacity.
    """

    forward: int
    backward: int
    """Twice the forward pass: for the gradients of inputs and of weights. Frozen weights take less."""
    recompute: int
    """Those that `training.recompute` computes a second time."""

    @property
    def model(self) -> int:
        """Forward and backward: what model FLOP/s utilisation counts."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ProcessLayout:
    """One way to distribute a run over processes, and the memory of each."""

    parallel: ParallelConfig
    memory: Memory
    fits: bool
    """True if a GPU has room for that."""


@dataclass(frozen=True)
class Plan:
    """Everything a recipe takes."""

    recipe: Recipe
    world: int
    size: counts.Size
    tensors: Tensors
    tokens_per_image: int
    compute: Compute
    layouts: tuple[ProcessLayout, ...]
    """The recipe's own, or all possible ones; those with the least communication first."""
    seconds: float
    """Time to the recipe's last step, at the given utilisation."""

    @property
    def chosen(self) -> ProcessLayout:
        """The first layout that fits; if none does, the one that takes the least."""
        fitting = [layout for layout in self.layouts if layout.fits]
        return fitting[0] if fitting else min(self.layouts, key=lambda layout: layout.memory.total)

    @property
    def trains_a_part(self) -> bool:
        """True with frozen weights or adapters; the activations are then an upper bound, as autograd keeps less."""
        return bool(self.recipe.init.freeze) or self.recipe.init.lora_rank is not None

    @property
    def images_per_process(self) -> int:
        """Images of a process in a micro-batch."""
        return self.recipe.training.batch_size // (self.world * self.recipe.training.accumulation)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        training = self.recipe.training
        images = training.steps * training.batch_size
        return {
            "world": self.world,
            "parameters": {**self.size._asdict(), "learning": self.tensors.learning},
            "images_per_step": training.batch_size,
            "images_per_process": self.images_per_process,
            "tokens_per_image": self.tokens_per_image,
            "flops_per_step": dataclasses.asdict(self.compute),
            "checkpoint_bytes": self.tensors.checkpoint,
            "model_bytes": self.tensors.published,
            "snapshot_bytes": self.tensors.snapshots,
            "layouts": [_layout_record(layout) for layout in self.layouts],
            "chosen": _layout_record(self.chosen),
            "steps": training.steps,
            "images": images,
            "tokens": images * self.tokens_per_image,
            "model_flops": training.steps * self.compute.model,
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
        }


def _layout_record(layout: ProcessLayout) -> dict[str, Any]:
    parallel = {name: getattr(layout.parallel, name) for name in ("replicate", "shard", "experts")}
    memory = dataclasses.asdict(layout.memory) | {"total": layout.memory.total}
    return parallel | {"memory_bytes": memory, "fits": layout.fits}


def make_plan(recipe: Recipe, options: PlanOptions) -> Plan:
    """Plan a recipe.

    Raises:
        ValueError: batch or model cannot be divided by so many processes, or the recipe's layout has another number.
    """
    if recipe.training.precision == "auto":  # plans are of GPUs, which have bfloat16
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision="bf16"))
    layouts, training = layouts_of(recipe, options.world), recipe.training
    world = layouts[0].processes
    images = counts.images_per_process(training.batch_size, training.accumulation, world)
    tensors = Tensors(recipe)
    fullest = with_capacity(recipe, recipe.capacity_at(1))
    kept = kept_activations(fullest, images, sharded=world > 1).total(training.recompute)
    received = received_bytes(fullest, images)
    found = []
    for layout in layouts:
        memory = tensors.memory(layout, kept + (received if layout.experts > 1 else 0))
        found.append(ProcessLayout(layout, memory, memory.total <= ROOM * 1e9 * options.memory_gb))
    compute = compute_of(with_capacity(recipe, mean_capacity(recipe)))
    speed = 1e12 * options.peak_tflops * options.utilisation * world
    return Plan(
        recipe=recipe,
        world=world,
        size=counts.model_size(recipe.model),
        tensors=tensors,
        tokens_per_image=counts.num_image_tokens(recipe.model),
        compute=compute,
        layouts=tuple(found),
        seconds=training.steps * compute.model / speed,
    )


def with_capacity(recipe: Recipe, capacity: float | None) -> Recipe:
    """The recipe with another capacity; None: as it is."""
    if capacity is None:
        return recipe
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, capacity=capacity))


def mean_capacity(recipe: Recipe) -> float | None:
    """Mean capacity of a run's steps; None without a schedule of the capacity."""
    if recipe.capacity_at(1) is None:
        return None
    steps = recipe.training.steps
    return sum(filter(None, map(recipe.capacity_at, range(1, steps + 1)))) / steps


def compute_of(recipe: Recipe) -> Compute:
    """Count the matmuls of a step."""
    training = recipe.training
    dropping, full = _compute_at(recipe, training.token_drop_rate), _compute_at(recipe, 0.0)
    steps = {dropping: training.dropping_steps, full: training.steps - training.dropping_steps}
    if dropping == full:
        return full

    def mean(name: str) -> int:
        return round(sum(count * getattr(compute, name) for compute, count in steps.items()) / training.steps)

    return Compute(mean("forward"), mean("backward"), mean("recompute"))


def _compute_at(recipe: Recipe, drop_rate: float) -> Compute:
    config, batch, flops = recipe.model, recipe.training.batch_size, counts.model_flops(recipe.model, drop_rate)
    shapes = counts.parameter_shapes(config)
    rows = {name: counts.matmul_rows(config, name, drop_rate) for name in shapes if name.endswith(".experts.w_in")}
    first_projections = sum(2 * count * math.prod(shapes[name][1:]) for name, count in rows.items())
    again = {"none": 0, "experts": first_projections, "blocks": sum(flops.blocks)}
    return Compute(batch * flops.total, 2 * batch * flops.total, batch * again[recipe.training.recompute])


def layouts_of(recipe: Recipe, world: int | None) -> list[ParallelConfig]:
    """The recipe's own layout, or if it has none all of so many processes; the least communication first.

    Raises:
        ValueError: the recipe's layout is of another number of processes, or cannot be; or there is none.
    """
    parallel = recipe.parallel
    if world is None or parallel.processes == world:
        _check(recipe)
        return [parallel]
    if parallel.processes > 1:
        raise ValueError(
            f"parallel.replicate x shard x experts is {parallel.replicate} x {parallel.shard} x {parallel.experts} = "
            f"{parallel.processes}, but --world is {world}; make them equal, or leave parallel out to compare layouts"
        )
    possible, reason = [], ""
    for experts, shard in itertools.product(range(1, world + 1), repeat=2):
        if world % (experts * shard):
            continue
        layout = dataclasses.replace(parallel, replicate=world // (experts * shard), shard=shard, experts=experts)
        try:
            _check(dataclasses.replace(recipe, parallel=layout))
            possible.append(layout)
        except ValueError as error:
            reason = str(error)
    if not possible:
        raise ValueError(f"no layout of {world} processes is possible; the last one: {reason}")
    return sorted(possible, key=lambda layout: (layout.shard * layout.experts, layout.experts))


def _check(recipe: Recipe) -> None:
    check_parallel(recipe, world=1)
    check_adapters(recipe, world=1)
