"""Bytes that a process holds of a run's state, and that its files take, from the shapes of its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from .. import counts
from ..config import InitConfig, ModelConfig, ParallelConfig, Recipe

FLOAT32 = 4
"""Bytes of an element of a weight, gradient or moment."""
STEP_BYTES = 4
"""AdamW's step count of a parameter."""
INDEX_BYTES = 28
"""Bytes of a dispatched row's weight and three int64 indices."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, the most that any holds."""

    weights: int
    """With routing state and tables."""
    gradients: int
    optimizer: int
    averages: int
    activations: int
    """Those kept of a micro-batch's forward pass."""
    gathered: int
    """Other processes' weights while they are used: an estimate."""

    @property
    def total(self) -> int:
        """All together."""
        return sum(astuple(self))


class Parameter(NamedTuple):
    """One parameter of a model in training."""

    name: str
    shape: tuple[int, ...]
    learns: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def local_size(self, layout: ParallelConfig) -> int:
        """Elements that a process holds; FSDP2 pads the last part."""
        if counts.is_expert(self.name):
            columns = math.ceil(self.shape[1] / layout.shard)
            return self.shape[0] // layout.experts * columns * math.prod(self.shape[2:])
        return math.ceil(self.shape[0] / (layout.shard * layout.experts)) * math.prod(self.shape[1:])

    def gathered(self, layout: ParallelConfig, itemsize: int) -> tuple[int, int]:
        """Bytes of the weight and of its gradient while its block runs, all processes' parts together.

        Args:
            itemsize: bytes of an element of the ordinary weights.
        """
        elements = self.size // (layout.experts if counts.is_expert(self.name) else 1)
        # Routers and norms are never gathered in bfloat16.
        weight = elements * (FLOAT32 if ".router." in self.name or "norm" in self.name else itemsize)
        # A gradient has its weight's dtype, and another copy in float32 to be summed over processes.
        return weight, weight + FLOAT32 * elements if self.learns else 0


class Tensors:
    """The tensors of a recipe's run.

    Raises:
        ValueError: a pattern of init.freeze or a target of init.lora_targets names nothing.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, config = recipe, recipe.model
        self.parameters = trained_parameters(config, recipe.init)
        self.buffers, saved_buffers = counts.buffer_bytes(config), counts.buffer_bytes(config, persistent=True)
        training, posthoc = recipe.training, len(set(recipe.training.posthoc_ema_stds))
        self.num_emas = 1 + len(set(training.extra_ema_decays)) + posthoc
        self.learning = sum(p.size for p in self.parameters if p.learns)
        """Number of parameters that learn."""
        weights, learning = FLOAT32 * sum(p.size for p in self.parameters), FLOAT32 * self.learning
        moments = sum(self._moments(p, FLOAT32 * p.size) for p in self.parameters if p.learns)
        self.checkpoint = weights + saved_buffers + self.num_emas * (learning + saved_buffers) + moments
        """Bytes of the tensors in a checkpoint."""
        num_snapshots = math.ceil(training.steps / training.posthoc_ema_every)
        self.snapshots = num_snapshots * posthoc * (learning + saved_buffers)
        """Bytes of the tensors in all snapshots of post-hoc EMAs."""
        shapes = counts.parameter_shapes(config).values()
        self.published = FLOAT32 * sum(map(math.prod, shapes)) + saved_buffers
        """Bytes of the tensors in the folder model/, and of each further EMA's."""

    def memory(self, layout: ParallelConfig, activations: int) -> Memory:
        """Memory of a process that holds so many bytes of activations."""
        alone = layout.processes == 1
        weights = FLOAT32 * sum(p.local_size(layout) for p in self.parameters)
        parts = {p: FLOAT32 * p.local_size(layout) for p in self.parameters if p.learns}
        learning = sum(parts.values())
        copied = learning if alone else weights  # on one process EMAs share what is frozen
        return Memory(
            weights=weights + self.buffers,
            gradients=learning,
            optimizer=sum(self._moments(p, part) for p, part in parts.items()),
            averages=self.num_emas * (copied + self.buffers),
            activations=activations,
            gathered=0 if alone else self._gathered(layout),
        )

    def _moments(self, p: Parameter, part: int) -> int:
        """Bytes of the moments of a part of so many bytes: Muon has one and AdamW two, with a step count."""
        is_muon = self.recipe.optimizer.kind == "muon" and counts.is_hidden_matrix(p.name, p.shape)
        return part if is_muon else 2 * part + STEP_BYTES

    def _gathered(self, layout: ParallelConfig) -> int:
        """The outer layers whole, with their gradients; the weights of two blocks; the gradients of one."""
        itemsize = 2 if self.recipe.training.precision == "bf16" else FLOAT32
        outer, weights, gradients = 0, [0] * self.recipe.model.depth, [0] * self.recipe.model.depth
        for p in self.parameters:
            if not p.name.startswith("blocks."):
                outer += FLOAT32 * p.size * (2 if p.learns else 1)
                continue
            weight, gradient = p.gathered(layout, itemsize)
            weights[counts.block_index(p.name)] += weight
            gradients[counts.block_index(p.name)] += gradient
        return outer + 2 * max(weights) + max(gradients)


def received_bytes(recipe: Recipe, images: int) -> int:
    """Bytes that expert parallelism keeps of rows received from other processes, under an even load."""
    config, itemsize = recipe.model, 2 if recipe.training.precision == "bf16" else FLOAT32
    rows = [counts.num_assignments(config, index, images) for index in config.moe_blocks]
    kept = max(rows, default=0) if recipe.training.recompute == "blocks" else sum(rows)
    return kept * (itemsize * config.hidden_size + INDEX_BYTES)


def trained_parameters(config: ModelConfig, init: InitConfig) -> list[Parameter]:
    """The parameters of a model in training, with adapters if the recipe adds any.

    Raises:
        ValueError: a pattern or a target names nothing, or nothing is left to learn.
    """
    shapes = counts.parameter_shapes(config)
    parameters = [Parameter(name, shape, init.lora_rank is None) for name, shape in shapes.items()]
    if init.lora_rank is not None:
        parameters = list(_with_adapters(parameters, init.lora_rank, init.lora_targets))
    for pattern in init.freeze:
        if not any(fnmatchcase(p.name, pattern) for p in parameters):
            raise ValueError(f"init.freeze has {pattern}, but no parameter's name is like it")
    frozen = [any(fnmatchcase(p.name, pattern) for pattern in init.freeze) for p in parameters]
    parameters = [p._replace(learns=p.learns and not no) for p, no in zip(parameters, frozen)]
    if not any(p.learns for p in parameters):
        raise ValueError(f"init.freeze is {', '.join(init.freeze)}, which leaves nothing to learn")
    return parameters


def _with_adapters(parameters: Sequence[Parameter], rank: int, targets: Sequence[str]) -> Iterator[Parameter]:
    """A LoRA's matrices beside the targets, and the label table learning if it is one; all else is frozen."""
    used = set()
    for p in parameters:
        stacked = counts.is_expert_matrix(p.name)
        is_linear = p.name.endswith(".weight") and len(p.shape) == 2
        layer = p.name.removesuffix(".weight")
        target = next((t for t in targets if (stacked or is_linear) and f".{layer}".endswith(f".{t}")), None)
        used.add(target)
        if target is None or layer == "y_embedder":
            yield p._replace(learns=target is not None)
            continue
        experts, inputs, outputs = p.shape if stacked else (1, p.shape[1], p.shape[0])
        yield p if stacked else p._replace(name=f"{layer}.base_layer.weight")
        yield Parameter(f"{layer}.lora_A.default.weight", (experts * rank, inputs), True)
        yield Parameter(f"{layer}.lora_B.default.weight", (outputs, experts * rank), True)
    for target in targets:
        if target not in used:
            raise ValueError(f"init.lora_targets has {target}, the end of no layer's name")
