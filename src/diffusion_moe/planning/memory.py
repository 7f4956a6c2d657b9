"""How many bytes a process holds of a run's state, and how many its checkpoints take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property

import torch
from torch import nn

from ..config import ModelConfig, ParallelConfig, Recipe
from ..models import Backbone, make_model
from ..moe import GroupedExperts
from ..text import TextFeatures
from ..training.checkpoint import state_tensors
from ..training.parallelize import computes_in_float32
from ..training.state import make_state

MOMENTS, STEP_BYTES = 2, 4
"""AdamW's tensors a parameter, and its step count."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, the most that any holds."""

    weights: int
    """With routing state and tables."""
    gradients: int
    optimizer: int
    averages: int
    activations: int
    """What is kept of a micro-batch's forward pass."""
    gathered: int
    """Other processes' weights while they are used: an estimate."""

    @property
    def total(self) -> int:
        """All together."""
        return sum(astuple(self))


def empty_prompt(config: ModelConfig) -> TextFeatures:
    """As large as any, for models that keep one."""
    pooled = torch.zeros(1, config.text_pooled_dim) if config.text_pooled_dim else None
    mask = torch.ones(1, config.text_length, dtype=torch.bool)
    return TextFeatures(torch.zeros(1, config.text_length, config.text_dim), mask, pooled)


class Tensors:
    """The tensors of a recipe's run, without their memory."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        empty = empty_prompt(recipe.model)
        with torch.device("meta"):
            self.state = make_state(recipe, torch.device("meta"), empty_prompt=empty)
        self.model: Backbone = self.state.model
        experts = [module for module in self.model.modules() if isinstance(module, GroupedExperts)]
        self.stacked = {id(parameter) for module in experts for parameter in module.parameters()}

    @cached_property
    def checkpoint(self) -> int:
        """Bytes of the tensors in a checkpoint."""
        return sum(tensor.nbytes for tensor in state_tensors(self.state).values())

    @cached_property
    def published(self) -> int:
        """Bytes of the tensors in the folder model/."""
        with torch.device("meta"):
            return sum(tensor.nbytes for tensor in make_model(self.recipe.model).state_dict().values())

    @cached_property
    def learning(self) -> int:
        """Parameters that learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def memory(self, layout: ParallelConfig, activations: int) -> Memory:
        """Of a process, with so many bytes of activations."""
        alone = layout.replicate * layout.shard * layout.experts == 1
        parts = {id(p): self._local(p, layout) * p.element_size() for p in self.model.parameters()}
        learning = [parts[id(p)] for p in self.model.parameters() if p.requires_grad]
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
        copied = sum(learning) if alone else sum(parts.values())  # alone, averages share what is frozen
        return Memory(
            weights=sum(parts.values()) + buffers,
            gradients=sum(learning),
            optimizer=sum(MOMENTS * part + STEP_BYTES for part in learning),
            averages=(1 + len(self.state.extra_emas)) * (copied + buffers),
            activations=activations,
            gathered=0 if alone else self._gathered(layout),
        )

    def _local(self, parameter: nn.Parameter, layout: ParallelConfig) -> int:
        """Numbers that a process holds of a parameter; FSDP2 fills the last ones up."""
        shape = parameter.shape
        if id(parameter) in self.stacked:
            columns = math.ceil(shape[1] / layout.shard)
            return shape[0] // layout.experts * columns * math.prod(shape[2:])
        return math.ceil(shape[0] / (layout.shard * layout.experts)) * math.prod(shape[1:])

    def _gathered(self, layout: ParallelConfig) -> int:
        """The outer layers whole, with their gradients; two blocks; the gradients of one."""
        narrow = 2 if self.recipe.training.precision == "bf16" else 4
        blocks = [list(self._gathered_of(block, layout, narrow)) for block in self.model.blocks]
        inner = {id(parameter) for block in self.model.blocks for parameter in block.parameters()}
        outer = [parameter for parameter in self.model.parameters() if id(parameter) not in inner]
        weights = max(sum(numbers * size for numbers, size, _ in block) for block in blocks)
        # A gradient stands in its weight's dtype and, for the sum over processes, in float32.
        gradients = max(sum(numbers * (size + 4) for numbers, size, learns in block if learns) for block in blocks)
        return sum(p.nbytes * (2 if p.requires_grad else 1) for p in outer) + 2 * weights + gradients

    def _gathered_of(self, block: nn.Module, layout: ParallelConfig, narrow: int) -> Iterator[tuple[int, int, bool]]:
        """Numbers, bytes of one, and whether it learns, of a block's parameters while they are used."""
        wide = {id(p) for module in block.modules() if computes_in_float32(module) for p in module.parameters()}
        for parameter in block.parameters():
            numbers = parameter.numel() // (layout.experts if id(parameter) in self.stacked else 1)
            yield numbers, 4 if id(parameter) in wide else narrow, parameter.requires_grad
