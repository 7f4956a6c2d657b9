"""Compute of a recipe: matmuls alone, two operations a multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Recipe
from ..counts import is_moe_block, model_flops, num_assignments


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of one step, over all processes."""

    forward: int
    """Forward pass."""
    backward: int
    """Twice the forward pass: for the gradients of inputs and of weights. Frozen weights take less."""
    recompute: int
    """What `training.recompute` computes a second time."""

    @property
    def model(self) -> int:
        """Forward and backward: what model FLOP/s utilisation counts."""
        return self.forward + self.backward


def compute_of(recipe: Recipe) -> Compute:
    """Count the matmuls of a step."""
    batch, flops = recipe.training.batch_size, model_flops(recipe.model)
    again = {"none": 0, "experts": _first_projections(recipe), "blocks": sum(flops.blocks)}
    return Compute(batch * flops.total, 2 * batch * flops.total, batch * again[recipe.training.recompute])


def _first_projections(recipe: Recipe) -> int:
    """Operations of all routed experts' first projections, for one image."""
    config = recipe.model
    columns = config.expert_dim * (2 if config.expert_activation == "swiglu" else 1)
    rows = sum(num_assignments(config, index) for index in range(config.depth) if is_moe_block(config, index))
    return 2 * rows * config.hidden_size * columns
